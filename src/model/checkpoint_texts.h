// The small text files of a checkpoint folder that this program writes: config.json, generation_config.json
// and a byte-level tokenizer. Pure.
#pragma once

#include <string>

#include "model/config.h"

namespace tessera {

std::string ConfigText(const ModelConfig& config);  // what ParseModelConfig reads back
std::string GenerationConfigText(const ModelConfig& config);

// A tokenizer.json without merges: the control tokens of the family (begin of sentence 0, end 1, pad 2), then
// one token for each byte, then the marks of chat, thought and tools.
inline constexpr int kByteTokenizerSize = 3 + 256 + 13;
std::string ByteTokenizerText();
std::string ByteTokenizerConfigText();  // tokenizer_config.json, with a minimal chat template

}  // namespace tessera
