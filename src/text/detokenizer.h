// Token ids -> text, one token at a time: holds back broken UTF-8 and what may become a stop string.
// One object per sequence, one thread at a time. What Push and Finish return joins to the full text.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "text/tokenizer.h"

namespace tessera {

struct StopRules {
  std::vector<std::string> strings;  // none empty; on a hit the first in list order wins, not the earliest
  bool include_in_output = false;
  int min_tokens = 0;  // text of the first min_tokens tokens is never searched
  bool skip_special_tokens = true;
};

class Detokenizer {
 public:
  // `tokenizer` outlives the object.
  Detokenizer(const Tokenizer& tokenizer, StopRules rules);

  // The text that has become certain. After a hit `stopped()` is set and nothing more may be pushed.
  // A token that ended the sequence (EOS, stop id) is pushed only if its text shall be seen.
  std::string Push(int32_t token);
  // The rest: held-back text; bytes of an unfinished character become U+FFFD. Empty after a hit.
  std::string Finish();
  // The stop string that was hit.
  const std::optional<std::string>& stopped() const { return stopped_; }

 private:
  void AppendText(int32_t token);
  void AppendThroughDecoder(int32_t token);
  std::string Search(size_t num_old_bytes);
  std::string Release(bool everything);

  const Tokenizer& tokenizer_;
  const StopRules rules_;
  size_t longest_stop_bytes_ = 0;
  size_t hold_back_bytes_ = 0;  // longest stop string - 1, 0 when stops are included or there are none
  std::string bytes_;           // an unfinished UTF-8 sequence
  std::string text_;            // decoded: the tail that may be searched again, then what is not yet released
  size_t released_ = 0;         // bytes of text_ that were returned before
  size_t search_floor_ = 0;     // no stop string may begin before this byte of text_
  int num_tokens_ = 0;
  TokenIds window_;             // other decoders than ByteLevel: the last ids, decoded together
  size_t num_window_done_ = 0;  // of these, how many have given their text
  std::optional<std::string> stopped_;
};

}  // namespace tessera
