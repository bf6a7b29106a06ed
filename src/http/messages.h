// The conversation of a chat request, turned into what text/chat_template.h renders. Checks shapes, not
// meaning: unknown roles and further keys of a message are the template's business.
#pragma once

#include <string>

#include "http/fields.h"

namespace tessera {

class ChatFields {
 public:
  // Types only; errors are collected in `fields`, whose body must outlive this.
  void Read(FieldReader& fields);
  ApiResult<ChatInput> Build(const ApiOptions& options) const;
  const std::string& last_role() const { return last_role_; }
  bool add_special_tokens() const { return add_special_tokens_; }

 private:
  const JsonArray* messages_ = nullptr;
  const JsonValue* tools_ = nullptr;
  const JsonObject* kwargs_ = nullptr;
  std::string reasoning_effort_;
  std::string last_role_;
  bool add_generation_prompt_ = true;
  bool continue_final_message_ = false;
  bool add_special_tokens_ = false;
};

}  // namespace tessera
