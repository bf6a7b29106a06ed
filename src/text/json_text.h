// The JSON of this room, and the only file that sees a JSON library: tokenizer_config.json, and a chat
// request's messages turned into the variables of its template.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "base/error.h"
#include "text/chat_template.h"
#include "text/control_scanner.h"

namespace tessera {

struct TokenizerConfig {
  bool add_bos = false;
  std::string bos_token;
  std::string eos_token;
  std::string chat_template;
};
Result<TokenizerConfig> ParseTokenizerConfig(std::string_view json);

// How strings are written for the template.
struct Marking {
  const ControlScanner& every_token;         // of strings outside of assistant messages
  const ControlScanner& every_but_thinking;  // inside of them
  std::string mark;                          // breaks a control token
  std::string tail;  // follows the final message's content where it is to be continued
};
struct TemplateVariables {
  std::string json;
  std::string
      final_content;  // of the last message, marked, without the tail; empty unless it is to be continued
};
// The variables of transformers: messages, tools, documents, add_generation_prompt, bos_token, eos_token and
// kwargs.
Result<TemplateVariables> WriteTemplateVariables(const ChatInput& input, std::string_view bos_token,
                                                 std::string_view eos_token, const Marking& marking);

}  // namespace tessera
