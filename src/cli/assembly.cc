// The composition of the engine; see assembly.h.
#include "cli/assembly.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <utility>

#include "base/format.h"
#include "base/log.h"
#include "base/memory.h"
#include "model/checkpoint.h"
#include "model/content_hash.h"

namespace tessera::cli {
namespace {

// The sockets of the ranks tell more of a failure, and sooner.
constexpr std::chrono::milliseconds kRayPatience{2000};

int64_t CeilDiv(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Shows how far loading is: a bar on a terminal, a line per tenth elsewhere.
class Progress {
 public:
  void operator()(uint64_t done, uint64_t total) {
    const int percent = total == 0 ? 100 : static_cast<int>(100.0 * static_cast<double>(done) / total);
    if (isatty(STDERR_FILENO)) {
      if (percent == last_) return;
      last_ = percent;
      const std::string bar(percent * 40 / 100, '#');
      fmt::print(stderr, "\r  [{:<40}] {:3d} %  {} of {}", bar, percent, BytesText(done), BytesText(total));
      if (done >= total) fmt::print(stderr, "\r\033[K");
      std::fflush(stderr);
    } else if (percent / 10 > last_ / 10 && total >= uint64_t{1} << 30) {
      last_ = percent;
      LogInfo("loading weights: {} of {}", BytesText(done), BytesText(total));
    }
  }

 private:
  int last_ = -1;
};

}  // namespace

void Assembly::Listener::Tell(const Error& error) {
  const std::lock_guard lock(mutex);
  if (news) return;
  news = error;
  if (engine != nullptr) engine->Break(error);
}

std::string BytesText(uint64_t bytes) {
  const double value = static_cast<double>(bytes);
  if (value >= 0x1p30) return Format("{:.2f} GiB", value / 0x1p30);
  if (value >= 0x1p20) return Format("{:.1f} MiB", value / 0x1p20);
  return Format("{:.1f} KiB", value / 0x1p10);
}

Result<CacheSize> SizeCache(const EngineFlags& flags, const CacheDemand& demand) {
  CacheSize size{.block_bytes = demand.block_bytes};
  const int64_t per_sequence = CeilDiv(demand.max_model_len, flags.block_size);
  const int64_t most =
      std::min<int64_t>(flags.max_num_seqs * per_sequence, std::numeric_limits<int32_t>::max());
  std::string source;
  int64_t room = 0;
  if (flags.num_gpu_blocks_override) {
    room = *flags.num_gpu_blocks_override;
    source = Format("--num-gpu-blocks-override {}", room);
  } else if (flags.kv_cache_memory_bytes) {
    room = *flags.kv_cache_memory_bytes / static_cast<int64_t>(demand.block_bytes);
    source = Format("--kv-cache-memory-bytes {}", *flags.kv_cache_memory_bytes);
  } else {
    const double budget = flags.gpu_memory_utilization * static_cast<double>(demand.memory_limit_bytes);
    const double left =
        budget - static_cast<double>(demand.weight_bytes) - static_cast<double>(demand.workspace_bytes);
    room = std::max<int64_t>(0, static_cast<int64_t>(left / static_cast<double>(demand.block_bytes)));
    source = Format("--gpu-memory-utilization {} of {}, less {} of weights and {} of workspace",
                    flags.gpu_memory_utilization, BytesText(demand.memory_limit_bytes),
                    BytesText(demand.weight_bytes), BytesText(demand.workspace_bytes));
  }
  if (room < per_sequence) {
    return Invalid(
        "the cache can hold {} tokens ({} blocks of {}, {} each, from {}), but one sequence of max_model_len "
        "{} needs "
        "{} blocks ({}): lower --max-model-len to at most {}, or give more memory",
        room * flags.block_size, room, flags.block_size, BytesText(demand.block_bytes), source,
        demand.max_model_len, per_sequence, BytesText(per_sequence * demand.block_bytes),
        room * flags.block_size);
  }
  size.num_blocks = static_cast<int>(std::min(room, most));
  return size;
}

uint64_t WorkspaceBytes(const ModelConfig& config, const EngineFlags& flags, const Degrees& degrees,
                        int64_t max_model_len) {
  const uint64_t tp = degrees.tp;
  const uint64_t heads = config.num_heads / tp;
  const uint64_t hidden = config.hidden_size;
  // Tokens of one group, and those that a rank's experts may see.
  const uint64_t tokens = std::min(flags.max_num_batched_tokens, flags.max_num_seqs * max_model_len);
  const uint64_t seen = degrees.dp > 1 ? tokens * degrees.dp : tokens;
  // Bytes per token: fp32 residual, norms and latents; bf16 per head, as the absorbed form of attention needs
  // them, which is more than the expanded one; int64 sums.
  const uint64_t attention =
      4 * (2 * hidden + 2 * config.q_lora_rank) +
      2 * heads * (config.qk_head_dim() + 2 * config.latent_width() + 2 * config.v_head_dim);
  // The table of rows (twice while it travels), their sums; gate, up and their product.
  const uint64_t dense = config.intermediate_size / tp;
  const uint64_t routed = uint64_t{1} * config.num_experts_per_tok * config.moe_intermediate_size /
                          static_cast<uint64_t>(degrees.world());
  const uint64_t feed_forward = 16 * hidden + 8 * hidden + 6 * routed;
  const uint64_t rotary = uint64_t{4} * max_model_len * config.qk_rope_head_dim;
  return tokens * (attention + 6 * dense) + seen * feed_forward +
         uint64_t{8} * flags.max_num_seqs * config.vocab_size / tp + rotary;
}

std::string ForcedIsa() {
  const char* forced = std::getenv("TESSERA_ISA");
  return forced == nullptr ? "" : forced;
}

Result<int> MaxModelLen(const EngineFlags& flags, const ModelConfig& config) {
  const int64_t length = flags.max_model_len.value_or(config.max_position_embeddings);
  if (length > config.max_position_embeddings) {
    return Invalid("--max-model-len: {} is greater than the model's max_position_embeddings {}", length,
                   config.max_position_embeddings);
  }
  return static_cast<int>(length);
}

Result<Agreement> MakeAgreement(const EngineFlags& flags, const ParallelPlan& plan, int max_model_len) {
  ASSIGN_OR_RETURN(const std::string content, HashCheckpoint(flags.model));
  const auto number = [](auto value) { return std::to_string(value); };
  return Agreement{{"version", TESSERA_VERSION},
                   {"numerics", std::string(kernels::kNumerics)},
                   {"model content", content.substr(0, 16)},
                   {"--tensor-parallel-size", number(plan.degrees.tp)},
                   {"--data-parallel-size", number(plan.degrees.dp)},
                   {"expert parallel size", number(plan.degrees.ep)},
                   {"vocab_emb_dp", plan.split_embedding ? "true" : "false"},
                   {"--quantization", plan.quantization},
                   {"--max-model-len", number(max_model_len)},
                   {"--block-size", number(flags.block_size)},
                   {"--max-num-batched-tokens", number(flags.max_num_batched_tokens)},
                   {"--max-num-seqs", number(flags.max_num_seqs)}};
}

RankOptions Assembly::OptionsOfRank(const EngineFlags& flags) const {
  return {.num_blocks = cache.num_blocks,
          .block_size = static_cast<int>(flags.block_size),
          .max_model_len = max_model_len,
          .num_tokens = tokenizer->vocab_size(),
          .decode_threads = static_cast<int>(flags.decode_threads)};
}

Result<CacheSize> Assembly::Fit(const EngineFlags& flags, uint64_t memory_bytes,
                                uint64_t weight_bytes) const {
  return SizeCache(flags, {.memory_limit_bytes = memory_bytes,
                           .weight_bytes = weight_bytes,
                           .workspace_bytes = WorkspaceBytes(config, flags, plan.degrees, max_model_len),
                           .block_bytes = KvCache::BlockBytes(config, static_cast<int>(flags.block_size)),
                           .max_model_len = max_model_len});
}

Status Assembly::LoadAlone(const EngineFlags& flags) {
  ASSIGN_OR_RETURN(const kernels::Kernels* const kernels, kernels::Choose(ForcedIsa()));
  ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(flags.model, config, plan.quantization));
  const int available = AvailableCores();
  num_threads = flags.threads > 0 ? static_cast<int>(flags.threads) : available;
  // Pinned where it takes every core: with fewer threads another process may take the same ones.
  std::vector<int> cores = AllowedCores();
  if (cores.size() != static_cast<size_t>(num_threads)) cores.clear();
  alone_.threads = std::make_unique<ThreadPool>(num_threads, num_threads <= available, cores);
  const RankShare share = ShareOfRank(config, Topology(), plan.split_embedding);
  ASSIGN_OR_RETURN(alone_.weights, Weights::Load(checkpoint, config, share, *alone_.threads, Progress()));
  ASSIGN_OR_RETURN(cache, Fit(flags, MemoryLimitBytes(), alone_.weights.size_bytes));
  Communicator& communicator = *alone_.communicator;
  ASSIGN_OR_RETURN(alone_.rank, Rank::Create(config, alone_.weights, {Topology(), communicator, communicator},
                                             OptionsOfRank(flags), *kernels, *alone_.threads));
  executor_ = std::make_unique<LocalExecutor>(*alone_.rank, alone_.weights.size_bytes);
  lines.push_back(Format("model {} ({}, {} layers, {} of weights)", flags.model, checkpoint.description(),
                         config.num_layers, BytesText(alone_.weights.size_bytes)));
  isa = kernels::IsaName(kernels->isa);
  lines.push_back(
      Format("numerics {}, instruction set {}, {} threads", kernels::kNumerics, isa, num_threads));
  return {};
}

// Room on Ray's nodes, and the way to bring them once the head listens.
Status Assembly::TakeRay(const Wishes& wishes, FleetOptions& options) {
  ASSIGN_OR_RETURN(ray_, RayCluster::Connect(plan.ray->python, wishes.cancelled));
  if (options.control.address.empty()) options.control.address = ray_->address();
  ASSIGN_OR_RETURN(const std::vector<RayNode> nodes, ray_->Reserve(plan.ray->request));
  for (const RayNode& node : nodes) {
    LogInfo("ranks {} to {} on {} ({}, {} cores, {})", node.ranks.first,
            node.ranks.first + node.ranks.count - 1, node.address, node.host, node.cores,
            BytesText(node.memory_bytes));
  }
  for (const std::string& text : SpannedGroups(nodes, plan.degrees)) LogWarning("{}", text);
  options.on_listening = [this, nodes](const Endpoint& head) {
    std::vector<std::vector<std::string>> commands;
    for (const RayNode& node : nodes) commands.push_back(NodeCommand(*plan.ray, node.ranks, head));
    auto variables = plan.ray->set;
    variables["TESSERA_CLUSTER_SECRET"] = plan.secret;
    return ray_->Start(commands, variables, plan.ray->defaults, kRayPatience,
                       [listener = listener_](const Error& error) { listener->Tell(error); });
  };
  return {};
}

Status Assembly::LoadFleet(const EngineFlags& flags, const Wishes& wishes) {
  FleetOptions options{.setup = {.model = flags.model,
                                 .quantization = plan.quantization,
                                 .degrees = plan.degrees,
                                 .split_embedding = plan.split_embedding,
                                 .block_size = static_cast<int32_t>(flags.block_size),
                                 .max_model_len = max_model_len,
                                 .num_tokens = tokenizer->vocab_size(),
                                 .threads = static_cast<int32_t>(flags.threads),
                                 .decode_threads = static_cast<int32_t>(flags.decode_threads),
                                 .isa = ForcedIsa(),
                                 .log_level = static_cast<int32_t>(wishes.log_level),
                                 .deadline_ms = wishes.exchange_limit.count()},
                       .local = plan.local,
                       .control = plan.control,
                       .secret = plan.secret,
                       .data_address = plan.data_address.empty() ? plan.control.address : plan.data_address,
                       .agreement = {}};
  if (plan.local.count < plan.degrees.world()) {
    ASSIGN_OR_RETURN(options.agreement, MakeAgreement(flags, plan, max_model_len));
  }
  const auto tell = [listener = listener_](const Error& error) { listener->Tell(error); };
  if (plan.ray) RETURN_IF_ERROR(TakeRay(wishes, options));
  const auto cancelled = [&] { return wishes.cancelled() || (ray_ != nullptr && ray_->loss()); };
  Result<std::unique_ptr<Fleet>> started = Fleet::Start(options, cancelled, tell);
  if (!started && ray_ != nullptr && ray_->loss()) return std::unexpected(*ray_->loss());  // the cause
  ASSIGN_OR_RETURN(std::unique_ptr<Fleet> fleet, std::move(started));
  uint64_t weight_bytes = 0;
  for (const RankLoaded& loaded : fleet->loaded()) {
    ASSIGN_OR_RETURN(const CacheSize fits, Fit(flags, loaded.memory_bytes, loaded.weight_bytes));
    if (cache.num_blocks == 0 || fits.num_blocks < cache.num_blocks) cache = fits;
    weight_bytes += loaded.weight_bytes;
  }
  RETURN_IF_ERROR(fleet->Begin(cache.num_blocks));
  lines.push_back(Format("model {} ({} layers), {} of weights on {} ranks: {}", flags.model,
                         config.num_layers, BytesText(weight_bytes), plan.degrees.world(),
                         DegreesText(plan.degrees)));
  isa = fleet->loaded()[0].isa;
  num_threads = ThreadsPerRank(static_cast<int>(flags.threads), plan.local.count);
  lines.push_back(Format("numerics {}, instruction set {} on rank 0", kernels::kNumerics, isa));
  executor_ = std::move(fleet);
  return {};
}

// One real step before anybody connects: it proves that the weights compute finite values, and faults in the
// code and the weights that a first request would wait for. Block 0 is written, as if by a sequence that has
// ended.
Status Assembly::WarmUp() {
  Step step;
  for (int i = 0; i < plan.degrees.dp; ++i) {
    GroupStep& group = step.groups.emplace_back();
    group.tokens.assign(std::min(4, max_model_len), config.bos_token_id);
    group.sequences.push_back({.num_tokens = static_cast<int32_t>(group.tokens.size()), .num_blocks = 1});
    group.block_ids.push_back(0);
    group.rows.push_back({.token = static_cast<int32_t>(group.tokens.size()) - 1, .sampling = 0});
    group.sampling.push_back({.temperature = 0, .position = static_cast<uint32_t>(group.tokens.size())});
  }
  return RunStep(step);
}

Status Assembly::RunStep(const Step& step) {
  ASSIGN_OR_RETURN(const StepOutput output, executor_->Run(step));
  for (const GroupOutput& part : output.groups) {
    for (const std::string& failure : part.failures) {
      if (!failure.empty()) return Fail(ErrorKind::kInternal, "the model failed: {}", failure);
    }
  }
  return {};
}

Assembly::~Assembly() {
  {
    const std::lock_guard lock(listener_->mutex);
    listener_->engine = nullptr;
  }
  engine.reset();  // its thread uses the executor
}

Result<std::unique_ptr<Assembly>> Assembly::Build(const EngineFlags& flags, const ModelConfig& config,
                                                  const ParallelPlan& plan, const Wishes& wishes) {
  std::unique_ptr<Assembly> assembly(new Assembly(config, plan));
  ASSIGN_OR_RETURN(assembly->tokenizer,
                   Tokenizer::Load(flags.tokenizer.empty() ? flags.model : flags.tokenizer));
  if (assembly->tokenizer->vocab_size() > config.vocab_size) {
    return Invalid("the tokenizer has ids up to {}, but the model's vocab_size is {}",
                   assembly->tokenizer->vocab_size() - 1, config.vocab_size);
  }
  ASSIGN_OR_RETURN(assembly->max_model_len, MaxModelLen(flags, config));
  if (!flags.enable_chunked_prefill && flags.max_num_batched_tokens < assembly->max_model_len) {
    LogWarning(
        "without chunked prefill, prompts of more than {} tokens (--max-num-batched-tokens) are refused",
        flags.max_num_batched_tokens);
  }
  RETURN_IF_ERROR(plan.processes ? assembly->LoadFleet(flags, wishes) : assembly->LoadAlone(flags));
  RETURN_IF_ERROR(assembly->WarmUp());
  const EngineOptions options{.num_groups = plan.degrees.dp,
                              .num_blocks = assembly->cache.num_blocks,
                              .block_size = static_cast<int>(flags.block_size),
                              .max_num_seqs = static_cast<int>(flags.max_num_seqs),
                              .max_num_batched_tokens = static_cast<int>(flags.max_num_batched_tokens),
                              .max_model_len = assembly->max_model_len,
                              .max_queued_requests = static_cast<int>(wishes.max_queued_requests),
                              .enable_chunked_prefill = flags.enable_chunked_prefill,
                              .enable_prefix_caching = flags.enable_prefix_caching,
                              .vocab_size = assembly->tokenizer->vocab_size()};
  assembly->engine = std::make_unique<Engine>(options, *assembly->executor_, assembly->clock);
  const std::lock_guard lock(assembly->listener_->mutex);
  assembly->listener_->engine = assembly->engine.get();
  if (assembly->listener_->news) assembly->engine->Break(*assembly->listener_->news);
  return assembly;
}

}  // namespace tessera::cli
