// Messages -> token ids through the checkpoint's Jinja template. Immutable after compiling; any thread.
// Control tokens that a user wrote inside a message stay text; those that the template writes become tokens.
// (Exception: the think marks inside assistant messages, which templates cut history at.)
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "base/error.h"
#include "text/tokenizer.h"

namespace tessera {

// All members are JSON texts. `messages` is an array of objects whose `content` is a string, null or absent
// (content parts are joined by the caller). `tools` is an array or "null"; `kwargs` an object of further
// variables.
struct ChatInput {
  std::string messages;
  std::string tools = "null";
  std::string kwargs = "{}";
  bool add_generation_prompt = true;
  bool continue_final_message = false;  // the last message is left open: its end mark is cut off
};

struct RenderedChat {
  std::string text;  // as a person would read the prompt
  TokenIds ids;      // no BOS beyond what the template writes
};

class ChatTemplate {
 public:
  // `source` is Jinja; kInvalid with line and reason when it does not compile. `tokenizer` outlives the
  // template.
  static Result<std::unique_ptr<ChatTemplate>> Compile(std::string_view source, const Tokenizer& tokenizer);
  ~ChatTemplate();

  // kInvalid when the template raises (raise_exception), fails or runs out of its step budget.
  Result<RenderedChat> Render(const ChatInput& input) const;

 private:
  struct Content;
  explicit ChatTemplate(std::unique_ptr<Content> content);
  std::unique_ptr<Content> content_;
};

}  // namespace tessera
