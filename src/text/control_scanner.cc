// A byte trie: one walk per '<', so a megabyte of hostile brackets costs as little as prose.
#include "text/control_scanner.h"

#include <algorithm>

namespace tessera {

ControlScanner::ControlScanner(std::span<const std::string> tokens) : nodes_(1) {
  for (const std::string& token : tokens) {
    if (token.find_first_not_of(" \t\n\f\r") == std::string::npos) continue;
    uint32_t node = 0;
    for (const char c : token) {
      const uint8_t byte = static_cast<uint8_t>(c);
      uint32_t next = Child(node, byte);
      if (next == 0) {
        next = static_cast<uint32_t>(nodes_.size());
        nodes_.emplace_back();
        auto& children = nodes_[node].children;
        children.insert(std::ranges::lower_bound(children, std::pair(byte, next)), {byte, next});
      }
      node = next;
    }
    nodes_[node].ends = true;
    begins_[static_cast<uint8_t>(token[0])] = true;
  }
}

uint32_t ControlScanner::Child(uint32_t node, uint8_t byte) const {
  const auto& children = nodes_[node].children;
  const auto found =
      std::ranges::lower_bound(children, byte, {}, [](const auto& child) { return child.first; });
  return found != children.end() && found->first == byte ? found->second : 0;
}

ControlScanner::Walk ControlScanner::WalkAt(std::string_view text, size_t position) const {
  Walk walk;
  uint32_t node = 0;
  for (size_t at = position; at < text.size(); ++at) {
    node = Child(node, static_cast<uint8_t>(text[at]));
    if (node == 0) return walk;
    if (nodes_[node].ends) walk.longest = at + 1 - position;
  }
  walk.ran_out_of_text = node != 0 && !nodes_[node].children.empty();
  return walk;
}

size_t ControlScanner::MatchAt(std::string_view text, size_t position) const {
  return begins_[static_cast<uint8_t>(text[position])] ? WalkAt(text, position).longest : 0;
}

std::string ControlScanner::Marked(std::string_view text, std::string_view mark) const {
  std::string marked;
  marked.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    if (!begins_[static_cast<uint8_t>(text[at])]) {
      marked += text[at++];
      continue;
    }
    const Walk walk = WalkAt(text, at);
    size_t end = at + 1;
    while (end < text.size() && (static_cast<uint8_t>(text[end]) & 0xC0) == 0x80) ++end;
    marked += text.substr(at, end - at);
    if (walk.longest > 0 || walk.ran_out_of_text) marked += mark;
    at = end;
  }
  return marked;
}

std::string Without(std::string_view text, std::string_view piece) {
  std::string rest;
  rest.reserve(text.size());
  for (size_t at = 0;;) {
    const size_t found = text.find(piece, at);
    rest += text.substr(at, found - at);
    if (found == std::string_view::npos) return rest;
    at = found + piece.size();
  }
}

}  // namespace tessera
