// A chat request as the variables of its Jinja template: what transformers would pass, with every control
// token in the messages and tools marked. Renders nothing.
#pragma once

#include <string>
#include <string_view>

#include "base/error.h"
#include "text/chat_template.h"
#include "text/control_scanner.h"

namespace tessera {

// How strings are written for the template.
struct Marking {
  const ControlScanner& every_token;         // of strings outside of assistant messages
  const ControlScanner& every_but_thinking;  // inside of them
  std::string mark;                          // breaks a control token
  std::string tail;                          // ends the final message's content if it is to be continued
};
struct TemplateVariables {
  std::string json;           // an object
  std::string final_content;  // of the last message, marked, without the tail; empty unless it is continued
};
// messages, tools, documents, add_generation_prompt, bos_token, eos_token and kwargs.
Result<TemplateVariables> WriteTemplateVariables(const ChatInput& input, std::string_view bos_token,
                                                 std::string_view eos_token, const Marking& marking);

}  // namespace tessera
