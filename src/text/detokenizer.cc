// Bytes, then characters, then certain text. With a ByteLevel decoder (DeepSeek, Qwen, Llama 3) the text of a
// sequence is exactly the joined bytes of its tokens, so nothing is decoded twice; other decoders look at
// their neighbours and go through a small window of ids.
#include "text/detokenizer.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "text/utf8.h"

namespace tessera {

Detokenizer::Detokenizer(const Tokenizer& tokenizer, StopRules rules)
    : tokenizer_(tokenizer), rules_(std::move(rules)) {
  for (const std::string& stop : rules_.strings) {
    CHECK(!stop.empty());
    longest_stop_bytes_ = std::max(longest_stop_bytes_, stop.size());
  }
  if (!rules_.include_in_output && longest_stop_bytes_ > 0) hold_back_bytes_ = longest_stop_bytes_ - 1;
}

std::string Detokenizer::Push(int32_t token) {
  CHECK(!stopped_);
  const size_t num_old_bytes = text_.size();
  AppendText(token);
  if (++num_tokens_ <= rules_.min_tokens) {
    search_floor_ = text_.size();
  } else if (!rules_.strings.empty() && text_.size() > num_old_bytes) {
    std::string last = Search(num_old_bytes);
    if (stopped_) return last;
  }
  return Release(/*everything=*/false);
}

std::string Detokenizer::Finish() {
  if (stopped_) return {};
  if (!bytes_.empty()) text_ += kReplacementCharacter;
  bytes_.clear();
  if (!window_.empty()) {
    const size_t done = tokenizer_.Decode(std::span(window_).first(num_window_done_), false).size();
    const std::string all = tokenizer_.Decode(window_, false);
    if (all.size() > done) text_ += all.substr(CharacterBoundary(all, done));
    window_.clear();
    num_window_done_ = 0;
  }
  return Release(/*everything=*/true);
}

void Detokenizer::AppendText(int32_t token) {
  if (rules_.skip_special_tokens && tokenizer_.IsSpecial(token)) return;
  if (!tokenizer_.byte_exact()) return AppendThroughDecoder(token);
  bytes_ += tokenizer_.TokenBytes(token);
  DrainUtf8(bytes_, text_);
}

void Detokenizer::AppendThroughDecoder(int32_t token) {
  // A character has at most 4 bytes, so 4 byte tokens; after 8 the decoder will not change its mind.
  constexpr size_t kMaxPending = 8;
  window_.push_back(token);
  const std::string done = tokenizer_.Decode(std::span(window_).first(num_window_done_), false);
  const std::string all = tokenizer_.Decode(window_, false);
  const bool unfinished =
      all.ends_with(kReplacementCharacter) && window_.size() - num_window_done_ < kMaxPending;
  if (all.size() <= done.size() || unfinished) return;
  text_ += all.substr(CharacterBoundary(all, done.size()));
  window_.erase(window_.begin(), window_.begin() + static_cast<std::ptrdiff_t>(num_window_done_));
  num_window_done_ = window_.size();
}

// Looks for stop strings that end in the bytes after `num_old_bytes`; on a hit returns the last text.
std::string Detokenizer::Search(size_t num_old_bytes) {
  for (const std::string& stop : rules_.strings) {
    const size_t seen = num_old_bytes >= stop.size() ? num_old_bytes - stop.size() + 1 : 0;
    const size_t found = text_.find(stop, std::max(seen, search_floor_));
    if (found == std::string::npos) continue;
    stopped_ = stop;
    const size_t end = rules_.include_in_output ? found + stop.size() : found;
    return text_.substr(released_, end - released_);
  }
  return {};
}

std::string Detokenizer::Release(bool everything) {
  size_t end = text_.size();
  if (!everything) end = CharacterBoundary(text_, end - std::min(end, hold_back_bytes_));
  if (end < released_) end = released_;
  std::string certain = text_.substr(released_, end - released_);
  released_ = end;
  // A later hit may begin in the last longest - 1 bytes; what lies before them and was returned can go.
  const size_t searched_again = longest_stop_bytes_ == 0 ? 0 : longest_stop_bytes_ - 1;
  const size_t done = std::min(released_, text_.size() - std::min(text_.size(), searched_again));
  text_.erase(0, done);
  released_ -= done;
  search_floor_ -= std::min(search_floor_, done);
  return certain;
}

}  // namespace tessera
