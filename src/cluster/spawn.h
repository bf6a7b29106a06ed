// Starts a child program with chosen descriptors. Knows nothing of what it is for.
#pragma once

#include <sys/types.h>

#include <span>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/net.h"

namespace tessera {

// Runs `program` with `arguments` (the first is its name) and those descriptors as 0 to n - 1; /dev/null
// where one is -1. No signal is blocked or ignored in it, and it leads a process group of its own: Ctrl-C is
// for the server, which tells its children. kUnavailable names the program.
Result<pid_t> Spawn(const std::string& program, const std::vector<std::string>& arguments,
                    std::span<const int> descriptors);

// Readable when the process has ended.
Socket OpenPidfd(pid_t process);

}  // namespace tessera
