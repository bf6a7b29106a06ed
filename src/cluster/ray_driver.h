// The text of python/tessera_ray/driver.py, which the build puts into the binary.
#pragma once

#include <string_view>

namespace tessera {

extern const std::string_view kRayDriver;

}  // namespace tessera
