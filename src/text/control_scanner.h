// Finds control tokens (the added tokens of a tokenizer) written in text, and breaks them with marks so that
// a template's own control tokens can be told from those a user wrote. Knows no ids and no JSON.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace tessera {

class ControlScanner {
 public:
  // Empty texts and runs of ASCII blanks control nothing and are left out.
  explicit ControlScanner(std::span<const std::string> tokens);

  // Bytes of the longest control token that begins at `position`; 0: none.
  size_t MatchAt(std::string_view text, size_t position) const;

  // `text` with `mark` behind the first character of every place where a control token begins, or where one
  // begins and the text ends before it does (joined to other text it might become one).
  std::string Marked(std::string_view text, std::string_view mark) const;

 private:
  struct Node {
    std::vector<std::pair<uint8_t, uint32_t>> children;  // sorted by byte
    bool ends = false;
  };
  struct Walk {
    size_t longest = 0;            // bytes of the longest whole token
    bool ran_out_of_text = false;  // inside a longer token
  };
  uint32_t Child(uint32_t node, uint8_t byte) const;  // 0: none
  Walk WalkAt(std::string_view text, size_t position) const;

  std::vector<Node> nodes_;  // a trie; node 0 is its root
  std::array<bool, 256> begins_ = {};
};

// `text` without any occurrence of `piece` (not empty).
std::string Without(std::string_view text, std::string_view piece);

}  // namespace tessera
