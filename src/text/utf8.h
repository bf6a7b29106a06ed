// UTF-8 in pieces: what of a byte stream is certain text, and where characters begin. Knows no tokens.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace tessera {

// Moves every decided character of `bytes` to the end of `text`. What can never become a character turns into
// one U+FFFD per maximal broken part (the rule of Unicode 3.9, so of Rust and Python); an unfinished last
// character stays in `bytes` (at most 3 bytes).
void DrainUtf8(std::string& bytes, std::string& text);

// The greatest position <= `position` at which a character of `text` (valid UTF-8) begins or the text ends.
size_t CharacterBoundary(std::string_view text, size_t position);

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";

}  // namespace tessera
