// The two markers of reasoning and the three states between them.
#include "text/output_parser.h"

#include <algorithm>
#include <utility>

namespace tessera {
namespace {

constexpr std::string_view kBegin = "<think>";
constexpr std::string_view kEnd = "</think>";

// Bytes at the end of `text` that may be the beginning of `marker`.
size_t PartialMarker(std::string_view text, std::string_view marker) {
  for (size_t size = std::min(text.size(), marker.size() - 1); size > 0; --size) {
    if (text.ends_with(marker.substr(0, size))) return size;
  }
  return 0;
}

}  // namespace

ParsedText ReasoningParser::Push(std::string_view text) {
  if (state_ == State::kContent) return {.reasoning = {}, .content = std::string(text)};
  held_ += text;
  if (state_ == State::kStart) {
    if (held_.size() < kBegin.size() && kBegin.starts_with(held_)) return {};
    if (held_.starts_with(kBegin)) held_.erase(0, kBegin.size());
    state_ = State::kReasoning;
  }
  ParsedText parsed;
  if (const size_t end = held_.find(kEnd); end != std::string::npos) {
    parsed.reasoning = held_.substr(0, end);
    parsed.content = held_.substr(end + kEnd.size());
    held_.clear();
    state_ = State::kContent;
    return parsed;
  }
  const size_t certain = held_.size() - PartialMarker(held_, kEnd);
  parsed.reasoning = held_.substr(0, certain);
  held_.erase(0, certain);
  return parsed;
}

ParsedText ReasoningParser::Finish() {
  return {.reasoning = std::exchange(held_, {}), .content = {}};
}

}  // namespace tessera
