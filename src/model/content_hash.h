// One number for what a checkpoint holds, so that hosts of one cluster can tell whether they have the same.
#pragma once

#include <string>

#include "base/error.h"

namespace tessera {

// SHA-256 (hex) over names, sizes and contents of config.json, the quantisation description and the
// .safetensors files. Of more than 256 MiB of tensors, both ends of each file (the first holds its header)
// and 64 KiB out of every 512 MiB are read, so that hundreds of gigabytes take seconds.
Result<std::string> HashCheckpoint(const std::string& folder);

}  // namespace tessera
