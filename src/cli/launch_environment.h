// Where a launcher put this process: what Slurm's srun, Open MPI's mpirun and Kubernetes' LeaderWorkerSet say
// in the environment, as values for --nnodes, --node-rank and --master-addr. Pure: it resolves no name and
// starts nothing. ParseServe calls it, so that all that follows sees an ordinary launch by flags.
#pragma once

#include <optional>
#include <string>

#include "base/error.h"
#include "cli/options.h"

namespace tessera::cli {

struct LaunchPlace {
  int64_t nnodes = 1;
  int64_t node_rank = 0;
  std::string head;    // the address of host 0; empty where the launcher does not name it
  std::string source;  // the variables with their values, for messages
};

// Nothing outside of a launcher, and nothing in a launch on one host. kInvalid names the variable, its value
// and what is wanted: numbers that contradict each other, several processes per host, two launchers at once.
Result<std::optional<LaunchPlace>> ReadLaunchPlace(const Variable& variable);

// Writes that into `parallel`, unless flags place this host already (`given` says which were typed); of a
// place,
// --master-addr alone may be typed. Returns a line for the log; empty where nothing was written.
Result<std::string> ApplyLaunchPlace(const Variable& variable, const ParsedFlags& given,
                                     ParallelFlags& parallel);

// The first host of a list as Slurm writes it: "gpu[003-007,9],login" is gpu003.
Result<std::string> FirstHost(const std::string& list);

}  // namespace tessera::cli
