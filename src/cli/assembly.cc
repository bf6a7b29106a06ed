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

namespace tessera::cli {
namespace {

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

uint64_t WorkspaceBytes(const ModelConfig& config, const EngineFlags& flags, int64_t max_model_len) {
  const uint64_t heads = config.num_heads;
  const uint64_t hidden = config.hidden_size;
  const uint64_t wide = std::max<uint64_t>(
      config.intermediate_size, uint64_t{1} * config.num_experts_per_tok * config.moe_intermediate_size);
  // Bytes per token: fp32 residual, norms and latents; bf16 per head; gate, up and their product; int64 sums.
  const uint64_t per_token =
      4 * (4 * hidden + 2 * config.q_lora_rank) +
      2 * heads * (config.qk_head_dim() + 2 * config.latent_width() + 2 * config.v_head_dim) + 12 * wide +
      16 * hidden;
  const uint64_t tokens = std::min(flags.max_num_batched_tokens, flags.max_num_seqs * max_model_len);
  const uint64_t rotary = uint64_t{4} * max_model_len * config.qk_rope_head_dim;
  return tokens * per_token + uint64_t{8} * flags.max_num_seqs * config.vocab_size + rotary;
}

Status Assembly::Load(const EngineFlags& flags) {
  const char* forced = std::getenv("TESSERA_ISA");
  ASSIGN_OR_RETURN(kernels, kernels::Choose(forced == nullptr ? "" : forced));
  ASSIGN_OR_RETURN(config, LoadModelConfig(flags.model));
  ASSIGN_OR_RETURN(tokenizer, Tokenizer::Load(flags.tokenizer.empty() ? flags.model : flags.tokenizer));
  if (tokenizer->vocab_size() > config.vocab_size) {
    return Invalid("the tokenizer has ids up to {}, but the model's vocab_size is {}",
                   tokenizer->vocab_size() - 1, config.vocab_size);
  }
  max_model_len = static_cast<int>(flags.max_model_len.value_or(config.max_position_embeddings));
  if (max_model_len > config.max_position_embeddings) {
    return Invalid("--max-model-len: {} is greater than the model's max_position_embeddings {}",
                   max_model_len, config.max_position_embeddings);
  }
  if (!flags.enable_chunked_prefill && flags.max_num_batched_tokens < max_model_len) {
    LogWarning(
        "without chunked prefill, prompts of more than {} tokens (--max-num-batched-tokens) are refused",
        flags.max_num_batched_tokens);
  }
  ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(flags.model, config, flags.quantization));
  checkpoint_form = checkpoint.description();
  threads =
      std::make_unique<ThreadPool>(flags.threads > 0 ? static_cast<int>(flags.threads) : AvailableCores());
  ASSIGN_OR_RETURN(weights, Weights::Load(checkpoint, config, WholeShare(config), *threads, Progress()));
  return {};
}

Status Assembly::Fit(const EngineFlags& flags) {
  const CacheDemand demand{.memory_limit_bytes = MemoryLimitBytes(),
                           .weight_bytes = weights.arena.size_bytes(),
                           .workspace_bytes = WorkspaceBytes(config, flags, max_model_len),
                           .block_bytes = KvCache::BlockBytes(config, static_cast<int>(flags.block_size)),
                           .max_model_len = max_model_len};
  ASSIGN_OR_RETURN(cache, SizeCache(flags, demand));
  const RankOptions options{.num_blocks = cache.num_blocks,
                            .block_size = static_cast<int>(flags.block_size),
                            .max_model_len = max_model_len,
                            .num_tokens = tokenizer->vocab_size()};
  ASSIGN_OR_RETURN(rank,
                   Rank::Create(config, weights, {Topology(), *alone, *alone}, options, *kernels, *threads));
  executor = std::make_unique<LocalExecutor>(*rank);
  return {};
}

// One real step before anybody connects: it proves that the weights compute finite values, and faults in the
// code and the weights that a first request would wait for. It goes past the engine, so that no counter
// moves; block 0 is written, as if by a sequence that has ended.
Status Assembly::WarmUp() {
  Step step;
  GroupStep& group = step.groups.emplace_back();
  group.tokens.assign(std::min(4, max_model_len), config.bos_token_id);
  group.sequences.push_back({.num_tokens = static_cast<int32_t>(group.tokens.size()), .num_blocks = 1});
  group.block_ids.push_back(0);
  group.rows.push_back({.token = static_cast<int32_t>(group.tokens.size()) - 1, .sampling = 0});
  group.sampling.push_back({.temperature = 0, .position = static_cast<uint32_t>(group.tokens.size())});
  ASSIGN_OR_RETURN(const StepOutput output, executor->Run(step));
  for (const GroupOutput& part : output.groups) {
    for (const std::string& failure : part.failures) {
      if (!failure.empty())
        return Fail(ErrorKind::kInternal, "the first step of the model failed: {}", failure);
    }
  }
  return {};
}

Result<std::unique_ptr<Assembly>> Assembly::Build(const EngineFlags& flags, int64_t max_queued_requests) {
  auto assembly = std::make_unique<Assembly>();
  RETURN_IF_ERROR(assembly->Load(flags));
  RETURN_IF_ERROR(assembly->Fit(flags));
  RETURN_IF_ERROR(assembly->WarmUp());
  const EngineOptions options{.num_blocks = assembly->cache.num_blocks,
                              .block_size = static_cast<int>(flags.block_size),
                              .max_num_seqs = static_cast<int>(flags.max_num_seqs),
                              .max_num_batched_tokens = static_cast<int>(flags.max_num_batched_tokens),
                              .max_model_len = assembly->max_model_len,
                              .max_queued_requests = static_cast<int>(max_queued_requests),
                              .enable_chunked_prefill = flags.enable_chunked_prefill,
                              .enable_prefix_caching = flags.enable_prefix_caching,
                              .vocab_size = assembly->tokenizer->vocab_size()};
  assembly->engine = std::make_unique<Engine>(options, *assembly->executor, assembly->clock);
  return assembly;
}

}  // namespace tessera::cli
