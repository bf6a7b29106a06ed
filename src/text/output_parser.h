// Splits what the model writes into reasoning and answer, in a stream: the parser `deepseek_r1`.
// A leading "<think>" is dropped; text before the first "</think>" is reasoning even if "<think>" never came;
// the rest is content. Joined pieces equal the split of the whole text, however the text was cut.
// One object per sequence, one thread at a time.
#pragma once

#include <string>
#include <string_view>

namespace tessera {

struct ParsedText {
  std::string reasoning;
  std::string content;
};

class ReasoningParser {
 public:
  // Disabled: everything is content.
  explicit ReasoningParser(bool enabled) : state_(enabled ? State::kStart : State::kContent) {}

  ParsedText Push(std::string_view text);
  ParsedText Finish();  // releases a held-back part of a marker
  bool in_reasoning() const { return state_ != State::kContent; }

 private:
  enum class State { kStart, kReasoning, kContent };
  State state_;
  std::string held_;  // may become a marker
};

}  // namespace tessera
