// The decoder table of Unicode 3.9, table 3-7: which second bytes each lead byte allows.
#include "text/utf8.h"

#include <cstdint>

namespace tessera {
namespace {

struct Lead {
  int length = 0;  // bytes of the character; 0: no character begins with this byte
  uint8_t second_low = 0x80;
  uint8_t second_high = 0xBF;
};

Lead ReadLead(uint8_t byte) {
  if (byte < 0x80) return {.length = 1};
  if (byte < 0xC2) return {};
  if (byte < 0xE0) return {.length = 2};
  if (byte < 0xF0) {
    return {.length = 3,
            .second_low = static_cast<uint8_t>(byte == 0xE0 ? 0xA0 : 0x80),
            .second_high = static_cast<uint8_t>(byte == 0xED ? 0x9F : 0xBF)};
  }
  if (byte < 0xF5) {
    return {.length = 4,
            .second_low = static_cast<uint8_t>(byte == 0xF0 ? 0x90 : 0x80),
            .second_high = static_cast<uint8_t>(byte == 0xF4 ? 0x8F : 0xBF)};
  }
  return {};
}

// How many bytes at the front of `bytes` (not empty) fit the character that its first byte begins.
int FittingBytes(std::string_view bytes, const Lead& lead) {
  int fitting = 1;
  while (fitting < lead.length && static_cast<size_t>(fitting) < bytes.size()) {
    const uint8_t byte = static_cast<uint8_t>(bytes[fitting]);
    const uint8_t low = fitting == 1 ? lead.second_low : 0x80;
    const uint8_t high = fitting == 1 ? lead.second_high : 0xBF;
    if (byte < low || byte > high) break;
    ++fitting;
  }
  return fitting;
}

}  // namespace

void DrainUtf8(std::string& bytes, std::string& text) {
  std::string_view rest = bytes;
  while (!rest.empty()) {
    const Lead lead = ReadLead(static_cast<uint8_t>(rest[0]));
    const int fitting = FittingBytes(rest, lead);
    if (fitting == lead.length) {
      text += rest.substr(0, fitting);
    } else if (lead.length != 0 && static_cast<size_t>(fitting) == rest.size()) {
      break;  // may still become a character
    } else {
      text += kReplacementCharacter;
    }
    rest.remove_prefix(fitting);
  }
  bytes.erase(0, bytes.size() - rest.size());
}

size_t CharacterBoundary(std::string_view text, size_t position) {
  if (position >= text.size()) return text.size();
  while (position > 0 && (static_cast<uint8_t>(text[position]) & 0xC0) == 0x80) --position;
  return position;
}

}  // namespace tessera
