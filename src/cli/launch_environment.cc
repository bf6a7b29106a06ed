// One function per launcher, then the rule that chooses among them, then the rule of the flags.
#include "cli/launch_environment.h"

#include <algorithm>
#include <cctype>
#include <string_view>
#include <utility>

#include "base/format.h"

namespace tessera::cli {
namespace {

constexpr int64_t kMaxHosts = 4096;    // as --nnodes
constexpr size_t kMaxHostBytes = 253;  // of a name in DNS
constexpr char kFlagsRule[] = "or give --nnodes, --node-rank and --master-addr, which rule";

using Place = std::optional<LaunchPlace>;

std::string Said(const char* name, const auto& value) {
  return Format("{} {}", name, value);
}

// What must be set; `beside` is what says so.
Result<std::string> Text(const Variable& variable, const char* name, const std::string& beside) {
  auto text = ValueOf(variable, name);
  if (!text) return Invalid("{} is not set beside {}: set it, {}", name, beside, kFlagsRule);
  return *std::move(text);
}

// A whole number from `least` to `most`.
Result<int64_t> Number(const Variable& variable, const char* name, int64_t least, int64_t most,
                       const std::string& beside) {
  ASSIGN_OR_RETURN(const std::string text, Text(variable, name, beside));
  const auto value = ParseCount(text, false);
  if (!value || *value < least || *value > most) {
    return Invalid("{} is '{}'{}{}: wanted a whole number from {} to {}; correct it, {}", name, text,
                   beside.empty() ? "" : " beside ", beside, least, most, kFlagsRule);
  }
  return *value;
}

struct SizeAndRank {
  int64_t size = 1;  // hosts; 1 where the launcher does not speak at all
  int64_t rank = 0;
};

// `rank` is not looked at on one host.
Result<SizeAndRank> ReadSizeAndRank(const Variable& variable, const char* size, const char* rank) {
  if (!ValueOf(variable, size)) return SizeAndRank{};
  ASSIGN_OR_RETURN(const int64_t hosts, Number(variable, size, 1, kMaxHosts, ""));
  if (hosts == 1) return SizeAndRank{};
  ASSIGN_OR_RETURN(const int64_t host, Number(variable, rank, 0, hosts - 1, Said(size, hosts)));
  return SizeAndRank{hosts, host};
}

// Only srun sets SLURM_STEP_NUM_NODES: in the script of sbatch there is none, in the shell of salloc it is 1.
Result<Place> OfSlurm(const Variable& variable) {
  constexpr char kSize[] = "SLURM_STEP_NUM_NODES", kTasks[] = "SLURM_STEP_NUM_TASKS",
                 kRank[] = "SLURM_NODEID", kHosts[] = "SLURM_STEP_NODELIST";
  ASSIGN_OR_RETURN(const SizeAndRank at, ReadSizeAndRank(variable, kSize, kRank));
  if (at.size == 1) return std::nullopt;
  const std::string beside = Said(kSize, at.size);
  ASSIGN_OR_RETURN(const int64_t tasks, Number(variable, kTasks, 1, INT64_MAX, beside));
  if (tasks != at.size) {
    return Invalid(
        "{} is {} beside {}: wanted one task per host, which starts all ranks of its host; srun --nodes={} "
        "--ntasks-per-node=1, {}",
        kTasks, tasks, beside, at.size, kFlagsRule);
  }
  ASSIGN_OR_RETURN(const std::string hosts, Text(variable, kHosts, beside));
  auto head = FirstHost(hosts);
  if (!head) return Invalid("{}: {}", kHosts, head.error().message);
  return LaunchPlace{at.size, at.rank, *std::move(head),
                     Format("{}, {}, {}", beside, Said(kRank, at.rank), Said(kHosts, hosts))};
}

// Of mpirun. Its own address is in OMPI_MCA_orte_hnp_uri, but rank 0 may be on another host, and Open MPI 5
// has no such variable.
Result<Place> OfOpenMpi(const Variable& variable) {
  constexpr char kSize[] = "OMPI_COMM_WORLD_SIZE", kRank[] = "OMPI_COMM_WORLD_RANK",
                 kLocal[] = "OMPI_COMM_WORLD_LOCAL_SIZE";
  ASSIGN_OR_RETURN(const SizeAndRank at, ReadSizeAndRank(variable, kSize, kRank));
  if (at.size == 1) return std::nullopt;
  const std::string beside = Said(kSize, at.size);
  ASSIGN_OR_RETURN(const int64_t local, Number(variable, kLocal, 1, at.size, beside));
  if (local != 1) {
    return Invalid(
        "{} is {} beside {}: wanted one process per host, which starts all ranks of its host; mpirun "
        "--map-by "
        "ppr:1:node --bind-to none, {}",
        kLocal, local, beside, kFlagsRule);
  }
  return LaunchPlace{at.size, at.rank, "", Format("{}, {}", beside, Said(kRank, at.rank))};
}

// What the controller of LeaderWorkerSet gives to every container of a group.
Result<Place> OfLeaderWorkerSet(const Variable& variable) {
  constexpr char kSize[] = "LWS_GROUP_SIZE", kRank[] = "LWS_WORKER_INDEX", kHead[] = "LWS_LEADER_ADDRESS";
  ASSIGN_OR_RETURN(const SizeAndRank at, ReadSizeAndRank(variable, kSize, kRank));
  if (at.size == 1) return std::nullopt;
  const std::string beside = Said(kSize, at.size);
  ASSIGN_OR_RETURN(const std::string head, Text(variable, kHead, beside));
  return LaunchPlace{at.size, at.rank, head,
                     Format("{}, {}, {}", beside, Said(kRank, at.rank), Said(kHead, head))};
}

// The flag that places this host by itself, or the backend for which no other host is looked for.
bool PlacedByFlags(const ParsedFlags& given, const ParallelFlags& p) {
  constexpr std::string_view kFlags[] = {"nnodes",
                                         "node-rank",
                                         "headless",
                                         "data-parallel-size-local",
                                         "data-parallel-start-rank",
                                         "data-parallel-address",
                                         "data-parallel-rpc-port",
                                         "node-ranks"};
  const std::string& backend = p.distributed_executor_backend;
  return std::any_of(std::begin(kFlags), std::end(kFlags),
                     [&](std::string_view name) { return given.Has(name); }) ||
         (backend != "auto" && backend != "mp") || p.data_parallel_backend == "ray";
}

}  // namespace

Result<std::string> FirstHost(const std::string& list) {
  std::string host;
  for (size_t i = 0; i < list.size() && list[i] != ',' && host.size() <= kMaxHostBytes; ++i) {
    if (list[i] == '[') {
      // Of the ranges in the bracket the first, of that its first number, with its zeros.
      const size_t close = list.find(']', i);
      const std::string_view inside = std::string_view(list).substr(i + 1, close - i - 1);
      const std::string_view number = inside.substr(0, inside.find_first_not_of("0123456789"));
      if (close == std::string::npos || number.empty() ||
          inside.find_first_not_of("0123456789-,") != std::string_view::npos) {
        return Invalid("'{}' is not a list of hosts; wanted e.g. node[001-004,007],gpu3", list);
      }
      host += number;
      i = close;
    } else if (std::isalnum(static_cast<unsigned char>(list[i])) ||
               std::string_view("-._").contains(list[i])) {
      host += list[i];
    } else {
      return Invalid("'{}' is not a list of hosts; wanted e.g. node[001-004,007],gpu3", list);
    }
  }
  if (host.empty()) return Invalid("'{}' begins without a host; wanted e.g. node[001-004,007],gpu3", list);
  if (host.size() > kMaxHostBytes)
    return Invalid("the first host of '{}' has more than {} characters", list.substr(0, 64), kMaxHostBytes);
  return host;
}

Result<Place> ReadLaunchPlace(const Variable& variable) {
  ASSIGN_OR_RETURN(const Place group, OfLeaderWorkerSet(variable));
  // In a job of Slurm mpirun starts its own servants by srun, so that both speak: Open MPI's are the inner
  // ones.
  ASSIGN_OR_RETURN(Place launcher, OfOpenMpi(variable));
  if (!launcher) {
    ASSIGN_OR_RETURN(launcher, OfSlurm(variable));
  }
  if (group && launcher) {
    return Invalid("two launchers place this process: {}; and {}. Unset the variables of one, {}",
                   group->source, launcher->source, kFlagsRule);
  }
  return group ? group : launcher;
}

Result<std::string> ApplyLaunchPlace(const Variable& variable, const ParsedFlags& given,
                                     ParallelFlags& parallel) {
  if (PlacedByFlags(given, parallel)) return std::string();
  ASSIGN_OR_RETURN(const Place place, ReadLaunchPlace(variable));
  if (!place) return std::string();
  if (place->head.empty() && parallel.master_addr.empty()) {
    return Invalid(
        "{}: Open MPI does not say on which host rank 0 runs; give --master-addr, the address of that host",
        place->source);
  }
  parallel.nnodes = place->nnodes;
  parallel.node_rank = place->node_rank;
  if (parallel.master_addr.empty()) parallel.master_addr = place->head;
  return Format("{}: as if --nnodes {} --node-rank {} --master-addr {} were given", place->source,
                place->nnodes, place->node_rank, parallel.master_addr);
}

}  // namespace tessera::cli
