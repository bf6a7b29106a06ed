// The rules behind parallel.h, in three parts: degrees, this host's place, and the network around it.
#include "cli/parallel.h"

#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <filesystem>
#include <numeric>
#include <optional>
#include <set>
#include <string_view>

#include "base/file.h"
#include "base/format.h"
#include "base/sha256.h"
#include "cli/model_yaml.h"

namespace tessera::cli {
namespace {

constexpr char kLoopback[] = "127.0.0.1";
constexpr uint64_t kMaxSecretBytes = 1 << 16;
constexpr int kDefaultControlPort = 29550;

// A degree and who said so, for messages.
struct Degree {
  int64_t value = 1;
  std::string source;
};

// "1, 2, 4": the degrees up to `limit` that divide it.
std::string DivisorsText(int limit) {
  std::vector<int> divisors;
  for (int i = 1; i <= limit; ++i)
    if (limit % i == 0) divisors.push_back(i);
  return Format("{}", fmt::join(divisors, ", "));
}

Result<Degree> TensorDegree(const ParallelFlags& p, const ModelYaml* yaml, std::vector<std::string>& notes) {
  const int64_t in_yaml = yaml == nullptr ? 1 : yaml->model_parallel.value_or(1);
  if (p.tensor_parallel_size) {
    if (in_yaml != *p.tensor_parallel_size && yaml != nullptr && yaml->model_parallel) {
      notes.push_back(Format("--tensor-parallel-size {} rules over model_parallel {} of {}",
                             *p.tensor_parallel_size, in_yaml, yaml->path));
    }
    return Degree{*p.tensor_parallel_size, "--tensor-parallel-size"};
  }
  if (in_yaml == 1) return Degree{1, "--tensor-parallel-size, which is not given"};
  return Invalid(
      "model_parallel is {} in {}, but --tensor-parallel-size is not given, which means 1: give "
      "--tensor-parallel-size {} (it rules over the file), or change the file",
      in_yaml, yaml->path, in_yaml);
}

Result<Degree> DataDegree(const ParallelFlags& p, const ModelYaml* yaml) {
  const Degree flag = {p.data_parallel_size, "--data-parallel-size"};
  if (yaml == nullptr || yaml->data_parallel.value_or(flag.value) == flag.value) return flag;
  return Invalid(
      "--data-parallel-size is {}, but data_parallel is {} in {}: both must be the same; give "
      "--data-parallel-size {}, or change the file",
      flag.value, *yaml->data_parallel, yaml->path, *yaml->data_parallel);
}

Result<Degree> ExpertDegreeOfYaml(const ParallelFlags& p, std::optional<int64_t> in_json,
                                  const ModelYaml& yaml, std::vector<std::string>& notes) {
  const Degree degree = {yaml.expert_parallel.value_or(1), Format("expert_parallel of {}", yaml.path)};
  const std::string origin = yaml.expert_parallel ? "" : " (not given, which means 1)";
  if (in_json && *in_json != degree.value) {
    return Invalid(
        "--additional-config: expert_parallel is {}, but {} in {}{}: both must be the same; leave it out of "
        "the flag, or change the file",
        *in_json, degree.value, yaml.path, origin);
  }
  notes.push_back(Format("expert parallel size {}: {}{} rules{}", degree.value, degree.source, origin,
                         p.enable_expert_parallel ? "; --enable-expert-parallel does not change it" : ""));
  return degree;
}

Degree ExpertDegreeOfFlags(const ParallelFlags& p, std::optional<int64_t> in_json, int64_t world,
                           std::vector<std::string>& warnings) {
  if (!p.enable_expert_parallel) {
    if (in_json) {
      warnings.push_back(
          Format("--additional-config: expert_parallel {} has no effect without --enable-expert-parallel: "
                 "every rank holds a part of all experts",
                 *in_json));
    }
    return {1, "no --enable-expert-parallel"};
  }
  if (in_json) return {*in_json, "expert_parallel of --additional-config"};
  return {world, "--enable-expert-parallel alone: all ranks"};
}

// CheckDegrees, with who asked for what and what would be possible.
Status CheckLayout(const Degree& tp, const Degree& dp, const Degree& ep, const ModelConfig& config) {
  const LayoutShape shape = {.num_heads = config.num_heads, .num_experts = config.n_routed_experts};
  const Degrees degrees = {static_cast<int>(dp.value), static_cast<int>(tp.value),
                           static_cast<int>(ep.value)};
  const Status status = CheckDegrees(degrees, shape);
  if (status) return {};
  const int most_tp = std::gcd(shape.num_heads, shape.num_leaves);
  if (most_tp % degrees.tp != 0) {
    return Invalid("{}; asked for by {}, possible for this model: {}", status.error().message, tp.source,
                   DivisorsText(most_tp));
  }
  return Invalid("{}; asked for by {}, possible here: {}", status.error().message, ep.source,
                 DivisorsText(std::gcd(degrees.world(), shape.num_experts)));
}

Status ChooseQuantization(const ServeOptions& options, const ModelYaml* yaml, LayoutChoice& choice) {
  choice.quantization = options.engine.quantization;
  if (!choice.quantization.empty()) choice.quantization_source = "--quantization";
  if (yaml == nullptr || !yaml->is_quantized) return {};
  if (!choice.quantization.empty() && choice.quantization != "ascend") {
    return Invalid("--quantization is {}, but quant_method is ptq in {}, which is ascend: leave the flag out",
                   choice.quantization, yaml->path);
  }
  choice.quantization = "ascend";
  choice.quantization_source = Format("quant_method ptq of {}", yaml->path);
  return {};
}

// Names of the original's model code: checked, of no effect.
Status CheckBackendNames(const Variable& variable, std::vector<std::string>& notes) {
  bool named = false;
  for (const char* name : {"vLLM_MODEL_BACKEND", "VLLM_MS_MODEL_BACKEND"}) {
    const auto value = ValueOf(variable, name);
    if (!value) continue;
    if (*value != "MindFormers" && *value != "MindONE") {
      return Invalid("{}: '{}' is not a model backend; wanted MindFormers, MindONE or unset", name, *value);
    }
    named = named || *value == "MindFormers";
  }
  if (named) notes.push_back("Run with Mindformers backend");
  return {};
}

// ------------------------------------------------------------------------------------- this host's place

// "ranks 8 to 15"
std::string RanksText(const NodeRanks& ranks) {
  return Format("ranks {} to {}", ranks.first, ranks.first + ranks.count - 1);
}

// --nnodes: all ranks in even parts, by host.
Status PlaceByNodes(const ParallelFlags& p, ParallelPlan& plan) {
  const auto nodes = static_cast<int>(p.nnodes);
  const auto node = static_cast<int>(p.node_rank.value_or(0));
  const int world = plan.degrees.world();
  if (world % nodes != 0) {
    return Invalid("--nnodes {}: it must divide the number of ranks, {} ({}); possible: {}", nodes, world,
                   DegreesText(plan.degrees), DivisorsText(world));
  }
  plan.local = {.first = world / nodes * node, .count = world / nodes};
  const int64_t groups = p.data_parallel_size_local.value_or(0);
  if (p.data_parallel_size_local && groups * plan.degrees.tp != plan.local.count) {
    return Invalid(
        "--data-parallel-size-local {} are {} ranks, but a host of --nnodes {} has {} of {}: leave it out",
        groups, groups * plan.degrees.tp, nodes, plan.local.count, world);
  }
  const int64_t start = p.data_parallel_start_rank.value_or(0);
  if (p.data_parallel_start_rank && start * plan.degrees.tp != plan.local.first) {
    return Invalid(
        "--data-parallel-start-rank {} begins at rank {}, but --node-rank {} of --nnodes {} at rank {}: "
        "leave "
        "it out",
        start, start * plan.degrees.tp, node, nodes, plan.local.first);
  }
  if (node > 0 && !p.headless)
    plan.notes.push_back(
        Format("--node-rank {}: this host runs headless, as if --headless were given", node));
  if (!p.data_parallel_address.empty() && p.data_parallel_address != p.master_addr) {
    plan.warnings.push_back(
        Format("--data-parallel-address {} is not used: with --nnodes {} hosts meet at "
               "--master-addr",
               p.data_parallel_address, nodes));
  }
  return {};
}

// Whole groups, from --data-parallel-start-rank on.
Status PlaceByGroups(const ParallelFlags& p, ParallelPlan& plan) {
  const int64_t groups = p.data_parallel_size;
  const int64_t local = p.data_parallel_size_local.value_or(groups);
  const int64_t start = p.data_parallel_start_rank.value_or(0);
  if (start + local > groups) {
    return Invalid(
        "--data-parallel-start-rank {} with --data-parallel-size-local {} ends at group {}, but "
        "--data-parallel-size is {}: the groups of all hosts must add up to it",
        start, local, start + local, groups);
  }
  if (plan.headless && !p.data_parallel_start_rank) {
    return Invalid(
        "--headless needs --data-parallel-start-rank, the first of the {} groups that run here (or --nnodes "
        "and --node-rank)",
        groups);
  }
  if (plan.headless && local == groups && !p.data_parallel_size_local) {
    return Invalid(
        "--headless would hold all {} ranks, so that none is left for the head: give "
        "--data-parallel-size-local (all {} groups only for a head with --data-parallel-size-local 0), or "
        "leave "
        "--headless out",
        plan.degrees.world(), groups);
  }
  plan.local = {.first = static_cast<int>(start) * plan.degrees.tp,
                .count = static_cast<int>(local) * plan.degrees.tp};
  return {};
}

// --node-ranks, which an agent of Ray gives: any consecutive ones.
Status PlaceByRanks(const ParallelFlags& p, ParallelPlan& plan) {
  const std::string& text = p.node_ranks;
  const int last_of_world = plan.degrees.world() - 1;
  int first = -1, last = -1;
  const char* end = text.data() + text.size();
  const auto [dash, error] = std::from_chars(text.data(), end, first);
  if (error == std::errc() && dash != end && *dash == '-') {
    const auto [stop, second] = std::from_chars(dash + 1, end, last);
    if (second != std::errc() || stop != end) last = -1;
  }
  if (!plan.headless) {
    return Invalid(
        "--node-ranks {}: only a --headless host holds a part of the ranks without flags for groups", text);
  }
  if (first < 0 || last < first || last > last_of_world) {
    return Invalid("--node-ranks: '{}'; wanted FIRST-LAST with ranks from 0 to {} ({})", text, last_of_world,
                   DegreesText(plan.degrees));
  }
  plan.local = {.first = first, .count = last - first + 1};
  return {};
}

Status ChooseExecutor(const ParallelFlags& p, ParallelPlan& plan) {
  const std::string& backend = p.distributed_executor_backend;
  if (p.UsesRay()) {
    plan.processes = true;
    return {};
  }
  const bool alone = plan.degrees.world() == 1 && plan.local.count == 1 && !plan.headless;
  if (backend == "uni" && !alone) {
    return Invalid(
        "--distributed-executor-backend uni runs one rank in this process, but there are {} ({}), {} of them "
        "here: wanted auto or mp",
        plan.degrees.world(), DegreesText(plan.degrees), plan.local.count);
  }
  plan.processes = backend == "mp" || !alone;
  return {};
}

// ASCEND_RT_VISIBLE_DEVICES: one rank per device that is named.
Status CheckSlots(const Variable& variable, const NodeRanks& local) {
  constexpr char kName[] = "ASCEND_RT_VISIBLE_DEVICES";
  const auto list = ValueOf(variable, kName);
  if (!list) return {};
  std::set<int> devices;
  for (size_t begin = 0; begin <= list->size();) {
    const size_t end = std::min(list->find(',', begin), list->size());
    std::string_view word = std::string_view(*list).substr(begin, end - begin);
    while (word.starts_with(' ')) word.remove_prefix(1);
    while (word.ends_with(' ')) word.remove_suffix(1);
    int device = -1;
    const auto [stop, error] = std::from_chars(word.data(), word.data() + word.size(), device);
    if (error != std::errc() || stop != word.data() + word.size() || device < 0)
      return Invalid("{} is '{}': '{}' is not the number of a device; wanted e.g. 0,1,2,3", kName, *list,
                     word);
    if (!devices.insert(device).second)
      return Invalid("{} is '{}': {} stands twice; each is one slot for a rank", kName, *list, device);
    begin = end + 1;
  }
  const auto slots = static_cast<int>(devices.size());
  if (local.count <= slots) return {};
  return Invalid(
      "{} ranks are to run here, but {} is '{}', which are {} slots: name more devices or unset it, or give "
      "this host fewer ranks (--data-parallel-size-local, --nnodes)",
      local.count, kName, *list, slots);
}

// --------------------------------------------------------------------------------------------- the network

// The address of the interface that `name` chooses; empty where it is unset.
Result<std::string> ChosenAddress(const Variable& variable, const char* name) {
  const auto interface = ValueOf(variable, name);
  if (!interface) return std::string();
  auto address = InterfaceAddress(*interface);
  if (!address) return Invalid("{}: {}", name, address.error().message);
  return address;
}

bool IsName(const std::string& written) {
  return written.find(':') == std::string::npos &&
         written.find_first_not_of("0123456789.") != std::string::npos && !IsLoopback(written);
}

// Whether `written`, as it stands on a command line, may be the IPv4 address `own`. A host name may be any.
bool IsSame(const std::string& own, const std::string& written) {
  return own == written || (IsLoopback(own) && IsLoopback(written)) || IsName(written);
}

// Where the head listens, and from where this host speaks to it.
Status ChooseControl(const ParallelFlags& p, const Variable& variable, ParallelPlan& plan) {
  const bool by_nodes = p.nnodes > 1;
  const std::string& written = by_nodes ? p.master_addr : p.data_parallel_address;
  const char* flag = by_nodes ? "--master-addr" : "--data-parallel-address";
  plan.control = {.address = written.empty() ? kLoopback : written,
                  .port = static_cast<int>(
                      by_nodes ? p.master_port : p.data_parallel_rpc_port.value_or(kDefaultControlPort))};
  if (written == "0.0.0.0" || written == "::") {
    return Invalid(
        "{} {} stands for all interfaces: wanted the one address of the head that the other hosts "
        "reach",
        flag, written);
  }
  ASSIGN_OR_RETURN(plan.source_address, ChosenAddress(variable, "GLOO_SOCKET_IFNAME"));
  ASSIGN_OR_RETURN(plan.data_address, ChosenAddress(variable, "HCCL_SOCKET_IFNAME"));
  if (plan.data_address.empty()) {
    ASSIGN_OR_RETURN(plan.data_address, ChosenAddress(variable, "TP_SOCKET_IFNAME"));
  }
  if (plan.ray) {  // Ray knows the address where none is chosen
    plan.control.port = static_cast<int>(p.data_parallel_rpc_port.value_or(0));
    if (written.empty()) plan.control.address.clear();
  }
  if (!plan.spread() || plan.source_address.empty()) return {};
  const std::string interface = *ValueOf(variable, "GLOO_SOCKET_IFNAME");
  // The head's own name may be loopback there (127.0.1.1 in Debian's hosts file), or nothing yet (a new pod).
  if (!plan.headless && (written.empty() || IsName(written))) {
    plan.control.address = plan.source_address;
    if (plan.ray) return {};
    plan.notes.push_back(Format("the other hosts are awaited on {}, of GLOO_SOCKET_IFNAME {}",
                                plan.control.Text(), interface));
    return {};
  }
  if (IsSame(plan.source_address, plan.control.address)) return {};
  if (plan.headless && written.empty()) {
    return Invalid(
        "{} is not given: with GLOO_SOCKET_IFNAME {} ({}) this host cannot reach the head on {}; "
        "give the head's address",
        flag, interface, plan.source_address, kLoopback);
  }
  if (plan.headless) return {};
  return Invalid(
      "{} is {}, but GLOO_SOCKET_IFNAME {} has the address {}: the head listens on one, so both "
      "must be the same; change either",
      flag, written, interface, plan.source_address);
}

Status ReadSecret(const ParallelFlags& p, const Variable& variable, ParallelPlan& plan) {
  if (p.cluster_secret_file.empty()) {
    plan.secret = ValueOf(variable, "TESSERA_CLUSTER_SECRET").value_or("");
  } else {
    auto text = ReadFile(p.cluster_secret_file, kMaxSecretBytes);
    if (!text) return Invalid("--cluster-secret-file: {}", text.error().message);
    while (text->ends_with('\n') || text->ends_with('\r')) text->pop_back();
    if (text->empty()) {
      return Invalid(
          "--cluster-secret-file {} is empty; wanted a line that only the hosts of this cluster know",
          p.cluster_secret_file);
    }
    struct stat status = {};
    if (stat(p.cluster_secret_file.c_str(), &status) == 0 && (status.st_mode & 0077) != 0) {
      plan.warnings.push_back(
          Format("--cluster-secret-file {}: other users of this host may read it (mode "
                 "{:03o}); chmod 600",
                 p.cluster_secret_file, status.st_mode & 0777));
    }
    plan.secret = std::move(*text);
  }
  if (plan.ray && plan.secret.empty()) {  // known to the nodes of this one start only
    std::array<uint8_t, 32> secret;
    FillRandom(std::as_writable_bytes(std::span(secret)));
    plan.secret = Hex(secret);
  }
  if (plan.spread() && plan.secret.empty() && !IsLoopback(plan.control.address)) {
    plan.warnings.push_back(
        Format("no cluster secret: whoever reaches {} may join as a host and see every prompt; give "
               "--cluster-secret-file or TESSERA_CLUSTER_SECRET on all hosts, or keep that network closed",
               plan.control.Text()));
  }
  return {};
}

void NotePlace(ParallelPlan& plan) {
  if (!plan.processes) return;
  if (plan.ray) {
    plan.notes.push_back(
        Format("layout: {}: {} ranks, placed by Ray", DegreesText(plan.degrees), plan.degrees.world()));
    return;
  }
  const std::string here = plan.local.count == 0 ? "no ranks" : RanksText(plan.local);
  const std::string meeting = !plan.spread()  ? std::string()
                              : plan.headless ? Format("; joins the head at {}", plan.control.Text())
                                              : Format("; other hosts join at {}", plan.control.Text());
  plan.notes.push_back(Format("layout: {}: {} ranks; here: {}{}", DegreesText(plan.degrees),
                              plan.degrees.world(), here, meeting));
}

}  // namespace

Result<LayoutChoice> ChooseLayout(const ServeOptions& options, const ModelConfig& config,
                                  const Variable& variable) {
  LayoutChoice choice;
  RETURN_IF_ERROR(CheckBackendNames(variable, choice.notes));
  std::optional<ModelYaml> read;
  if (const auto path = ValueOf(variable, "MINDFORMERS_MODEL_CONFIG")) {
    auto parsed = ReadModelYaml(*path, config);
    if (!parsed) return Invalid("MINDFORMERS_MODEL_CONFIG: {}", parsed.error().message);
    read = std::move(*parsed);
    choice.notes.insert(choice.notes.end(), read->notes.begin(), read->notes.end());
  }
  const ModelYaml* yaml = read ? &*read : nullptr;
  const ParallelFlags& p = options.parallel;
  const auto in_json = ExpertParallelOf(options.engine.additional_config);
  ASSIGN_OR_RETURN(const Degree tp, TensorDegree(p, yaml, choice.notes));
  ASSIGN_OR_RETURN(const Degree dp, DataDegree(p, yaml));
  Degree ep;
  if (yaml != nullptr) {
    ASSIGN_OR_RETURN(ep, ExpertDegreeOfYaml(p, in_json, *yaml, choice.notes));
    if (yaml->pipeline_stage.value_or(1) != 1)
      choice.notes.push_back(
          Format("pipeline_stage {} of {} counts as 1", *yaml->pipeline_stage, yaml->path));
    choice.split_embedding = yaml->vocab_emb_dp;
  } else {
    ep = ExpertDegreeOfFlags(p, in_json, tp.value * dp.value, choice.warnings);
  }
  RETURN_IF_ERROR(CheckLayout(tp, dp, ep, config));
  choice.degrees = {static_cast<int>(dp.value), static_cast<int>(tp.value), static_cast<int>(ep.value)};
  RETURN_IF_ERROR(ChooseQuantization(options, yaml, choice));
  return choice;
}

Result<ParallelPlan> PlanParallel(const ServeOptions& options, const ModelConfig& config,
                                  const Variable& variable) {
  const ParallelFlags& p = options.parallel;
  ASSIGN_OR_RETURN(LayoutChoice choice, ChooseLayout(options, config, variable));
  ParallelPlan plan{.degrees = choice.degrees,
                    .split_embedding = choice.split_embedding,
                    .headless = p.IsWorker(),
                    .quantization = std::move(choice.quantization),
                    .quantization_source = std::move(choice.quantization_source),
                    .notes = std::move(choice.notes),
                    .warnings = std::move(choice.warnings)};
  if (p.UsesRay()) {
    std::error_code none;
    ASSIGN_OR_RETURN(plan.ray, PlanRay(options, plan.degrees, variable, std::filesystem::current_path(none)));
  } else {
    RETURN_IF_ERROR(!p.node_ranks.empty() ? PlaceByRanks(p, plan)
                    : p.nnodes > 1        ? PlaceByNodes(p, plan)
                                          : PlaceByGroups(p, plan));
  }
  RETURN_IF_ERROR(ChooseExecutor(p, plan));
  RETURN_IF_ERROR(CheckSlots(variable, plan.local));
  RETURN_IF_ERROR(ChooseControl(p, variable, plan));
  RETURN_IF_ERROR(ReadSecret(p, variable, plan));
  NotePlace(plan);
  return plan;
}

}  // namespace tessera::cli
