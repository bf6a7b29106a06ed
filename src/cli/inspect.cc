// The two reports of inspect.h, each as text for people and as JSON. A rank's weights are those that the
// loader plans (ListHeldTensors), its cache what serve would take.
#include "cli/inspect.h"

#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <optional>
#include <vector>

#include "base/file.h"
#include "base/format.h"
#include "cli/assembly.h"
#include "cli/flags.h"
#include "cli/json.h"
#include "model/checkpoint.h"
#include "model/config.h"
#include "model/kv_cache.h"
#include "model/share.h"
#include "model/weights.h"

namespace tessera::cli {
namespace {

constexpr char kInspect[] = "Inspect";
constexpr char kBf16[] = "none";  // of --quantization

struct InspectFlags {
  ServeOptions serve;  // the flags that both commands have
  bool layout = false;
  bool json = false;
  std::optional<int64_t> rank;
  std::optional<int64_t> memory_bytes;
};

FlagTable Table(InspectFlags& o) {
  FlagTable table{
      .command = "tessera inspect",
      .summary =
          "Shows what a checkpoint is, or what each rank of a layout would hold of it. MODEL is a folder,\n"
          "or a config.json alone; then --quantization says how the weights would be stored.",
      .positional_name = "MODEL",
      .positional = &o.serve.engine.model,
      .flags = {
          {"layout", "", BoolFlag{&o.layout}, "the ranks, what each holds and its bytes", kInspect},
          {"rank", "", OptionalIntFlag{&o.rank, 0, (1 << 24) - 1}, "and the tensors of this one", kInspect},
          {"memory", "", OptionalIntFlag{&o.memory_bytes, 1, INT64_MAX, true},
           "RAM of a rank: shows how many tokens its cache would hold", kInspect},
          {"json", "", BoolFlag{&o.json}, "machine-readable, bytes exact", kInspect}}};
  // Those of serve that change what a rank needs; the same declarations.
  constexpr std::array<std::string_view, 6> kShared = {"quantization", "max-model-len",
                                                       "max-num-seqs", "max-num-batched-tokens",
                                                       "block-size",   "gpu-memory-utilization"};
  for (Flag& flag : EngineFlagTable(o.serve.engine)) {
    if (std::find(kShared.begin(), kShared.end(), flag.name) != kShared.end())
      table.flags.push_back(std::move(flag));
  }
  for (Flag& flag : LayoutFlagTable(o.serve.parallel, o.serve.engine.additional_config))
    table.flags.push_back(std::move(flag));
  return table;
}

// ------------------------------------------------------------------------------------------------ the model

struct Subject {
  std::string path;
  ModelConfig config;
  std::optional<Checkpoint> checkpoint;  // absent: config.json is all there is
  std::string form;                      // "W8A8 (ModelSlim)"
  uint64_t file_bytes = 0;
  int num_files = 0;

  Scheme SchemeOf(std::string_view linear) const {
    if (checkpoint) return checkpoint->SchemeOf(linear);
    if (form == "bf16") return Scheme::kBf16;
    return linear.find(".self_attn.") != std::string_view::npos ? Scheme::kInt8Static : Scheme::kInt8Dynamic;
  }
};

bool IsFolder(const std::string& path) {
  struct stat status = {};
  return stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode);
}

Result<Subject> OpenConfig(const std::string& path) {
  Subject subject{.path = path};
  if (IsFolder(path)) {
    ASSIGN_OR_RETURN(subject.config, LoadModelConfig(path));
    ASSIGN_OR_RETURN(const std::vector<std::string> names, ListFiles(path));
    for (const std::string& name : names) {
      if (!name.ends_with(".safetensors")) continue;
      ASSIGN_OR_RETURN(const RandomAccessFile file, RandomAccessFile::Open(path + "/" + name));
      subject.file_bytes += file.size_bytes();
      ++subject.num_files;
    }
    return subject;
  }
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  auto config = ParseModelConfig(text);
  if (!config) return Invalid("{}: {}", path, config.error().message);
  subject.config = std::move(*config);
  return subject;
}

// How the weights are stored: what the tensors say, or what was asked for where there are none.
Status OpenWeights(const std::string& quantization, const std::string& source, Subject& subject) {
  if (subject.num_files > 0) {
    auto opened = Checkpoint::Open(subject.path, subject.config, quantization);
    if (!opened) {
      return Invalid("{}{}", opened.error().message,
                     source.empty() ? "" : Format(" (asked for by {})", source));
    }
    subject.checkpoint = std::move(*opened);
    subject.form = subject.checkpoint->description();
    return {};
  }
  if (quantization != "ascend" && quantization != kBf16) {
    return Invalid(
        "{} holds no weights, and --quantization is {}: wanted ascend (W8A8 of ModelSlim) or {} (bf16)",
        subject.path, quantization.empty() ? "not given" : "'" + quantization + "'", kBf16);
  }
  subject.form = quantization == kBf16 ? "bf16" : "W8A8 (ModelSlim)";
  return {};
}

uint64_t SumOfBytes(const std::vector<HeldTensor>& tensors) {
  return std::accumulate(tensors.begin(), tensors.end(), uint64_t{0},
                         [](uint64_t sum, const HeldTensor& tensor) { return sum + tensor.bytes; });
}

std::string Summary(const Subject& subject, bool json) {
  const ModelConfig& c = subject.config;
  const auto held = ListHeldTensors(c, WholeShare(c), [&](auto linear) { return subject.SchemeOf(linear); });
  const uint64_t packed = SumOfBytes(held);
  const uint64_t per_token = KvCache::BlockBytes(c, 16) / 16;
  if (json) {
    return Format(
        "{{\"model\":{},\"scheme\":{},\"files\":{},\"file_bytes\":{},\"tensors\":{},\"weight_bytes\":{},"
        "\"cache_bytes_per_token\":{},\"layers\":{},\"hidden_size\":{},\"heads\":{},\"experts\":{}}}\n",
        JsonQuote(subject.path), JsonQuote(subject.form), subject.num_files, subject.file_bytes, held.size(),
        packed, per_token, c.num_layers, c.hidden_size, c.num_heads, c.n_routed_experts);
  }
  std::string out = Format("{}\n", subject.path);
  const auto line = [&](std::string_view name, const std::string& value) {
    out += Format("  {:<12}{}\n", name, value);
  };
  line("weights",
       subject.num_files == 0
           ? subject.form + ", none here"
           : Format("{}, {} files of {}{}", subject.form, subject.num_files, BytesText(subject.file_bytes),
                    subject.checkpoint->has_mtp() ? ", with an MTP layer" : ""));
  line("layers", Format("{} ({} dense, {} with experts), hidden size {}", c.num_layers,
                        c.first_k_dense_replace, c.num_layers - c.first_k_dense_replace, c.hidden_size));
  line("attention", Format("{} heads, q_lora_rank {}, kv_lora_rank {}, rope {}", c.num_heads, c.q_lora_rank,
                           c.kv_lora_rank, c.qk_rope_head_dim));
  line("experts", Format("{} routed in {} groups, {} per token, {} shared, width {}", c.n_routed_experts,
                         c.n_group, c.num_experts_per_tok, c.n_shared_experts, c.moe_intermediate_size));
  line("vocabulary", Format("{}, up to {} positions", c.vocab_size, c.max_position_embeddings));
  line("one rank",
       Format("{} tensors, {}; {} of cache per token", held.size(), BytesText(packed), BytesText(per_token)));
  return out;
}

// ----------------------------------------------------------------------------------------------- the layout

struct RankDemand {
  Topology topology;
  RankShare share;
  uint64_t weight_bytes = 0;
  int64_t cache_tokens = 0;  // with --memory
};

struct LayoutReport {
  const Subject& subject;
  const InspectFlags& flags;
  LayoutChoice choice;
  uint64_t workspace_bytes = 0;
  uint64_t block_bytes = 0;
  std::vector<RankDemand> ranks;
  std::vector<HeldTensor> tensors;  // of --rank

  // Tokens of a group: its ranks hold the same, so that the smallest cache counts.
  int64_t TokensOfGroup(int group) const {
    int64_t least = INT64_MAX;
    for (const RankDemand& rank : ranks) {
      if (rank.topology.dp_rank() == group) least = std::min(least, rank.cache_tokens);
    }
    return least;
  }
};

// What serve's --gpu-memory-utilization leaves for the cache.
int64_t CacheTokens(const EngineFlags& flags, double memory_bytes, uint64_t used_bytes,
                    uint64_t block_bytes) {
  const double left = flags.gpu_memory_utilization * memory_bytes - static_cast<double>(used_bytes);
  if (left < 0) return 0;
  return static_cast<int64_t>(left / static_cast<double>(block_bytes)) * flags.block_size;
}

Result<LayoutReport> MakeLayout(const Subject& subject, const InspectFlags& flags, LayoutChoice choice) {
  const ModelConfig& config = subject.config;
  const EngineFlags& engine = flags.serve.engine;
  ASSIGN_OR_RETURN(const int max_model_len, MaxModelLen(engine, config));
  LayoutReport report{.subject = subject,
                      .flags = flags,
                      .choice = std::move(choice),
                      .block_bytes = KvCache::BlockBytes(config, static_cast<int>(engine.block_size))};
  const Degrees& degrees = report.choice.degrees;
  report.workspace_bytes = WorkspaceBytes(config, engine, degrees, max_model_len);
  if (flags.rank.value_or(0) >= degrees.world()) {
    return Invalid("--rank {} is outside of 0 to {} ({})", *flags.rank, degrees.world() - 1,
                   DegreesText(degrees));
  }
  for (int i = 0; i < degrees.world(); ++i) {
    const Topology topology(degrees, i);
    RankDemand rank{.topology = topology,
                    .share = ShareOfRank(config, topology, report.choice.split_embedding)};
    auto held = ListHeldTensors(config, rank.share, [&](auto linear) { return subject.SchemeOf(linear); });
    rank.weight_bytes = SumOfBytes(held);
    rank.cache_tokens = CacheTokens(engine, static_cast<double>(flags.memory_bytes.value_or(0)),
                                    rank.weight_bytes + report.workspace_bytes, report.block_bytes);
    if (flags.rank == i) report.tensors = std::move(held);
    report.ranks.push_back(rank);
  }
  return report;
}

const char* ModeText(MoeMode mode) {
  switch (mode) {
    case MoeMode::kReduce:
      return "every rank has all tokens, sums are reduced";
    case MoeMode::kGather:
      return "tokens are gathered by all ranks, sums return to their owners";
    case MoeMode::kExchange:
      return "tokens travel to the ranks that hold their experts";
  }
  return "";
}

std::string SliceText(Slice slice) {
  if (slice.size() == 0) return "-";
  return slice.size() == 1 ? std::to_string(slice.begin) : Format("{}-{}", slice.begin, slice.end - 1);
}

std::string LayoutText(const LayoutReport& r) {
  const Degrees& d = r.choice.degrees;
  const EngineFlags& engine = r.flags.serve.engine;
  std::string out =
      Format("{} ({}): {}: {} ranks in {} group{}; {}\n", r.subject.path, r.subject.form, DegreesText(d),
             d.world(), d.dp, d.dp == 1 ? "" : "s", ModeText(r.ranks[0].topology.mode()));
  out += Format("a token takes {} bytes of cache on every rank of its group, a block of {} positions {}\n\n",
                r.block_bytes / static_cast<uint64_t>(engine.block_size), engine.block_size, r.block_bytes);
  out += Format("{:>5} {:>4} {:>4}  {:<9} {:<7} {:<9} {:<7} {:<7} {:<14} {:<14} {:>11}{}\n", "rank", "dp",
                "tp", "heads", "leaves", "experts", "of each", "shared", "embedding", "lm_head", "weights",
                r.flags.memory_bytes ? "  cache tokens" : "");
  for (const RankDemand& rank : r.ranks) {
    const RankShare& s = rank.share;
    out += Format("{:>5} {:>4} {:>4}  {:<9} {:<7} {:<9} {:<7} {:<7} {:<14} {:<14} {:>11}{}\n",
                  rank.topology.rank(), rank.topology.dp_rank(), rank.topology.tp_rank(), SliceText(s.heads),
                  SliceText(s.tensor_leaves), SliceText(s.experts), SliceText(s.expert_leaves),
                  SliceText(s.shared_leaves), SliceText(s.embedding), SliceText(s.head),
                  BytesText(rank.weight_bytes),
                  r.flags.memory_bytes ? Format("  {:>12}", rank.cache_tokens) : std::string());
  }
  uint64_t most = 0, sum = 0;
  for (const RankDemand& rank : r.ranks) {
    most = std::max(most, rank.weight_bytes);
    sum += rank.weight_bytes;
  }
  out += Format("\nweights: at most {} per rank, {} in all\n", BytesText(most), BytesText(sum));
  if (r.flags.memory_bytes) {
    int64_t all = 0;
    for (int group = 0; group < d.dp; ++group) all += r.TokensOfGroup(group);
    out += Format(
        "cache: {} tokens in all groups, with {} of {} per rank less weights and {} of workspace ({} tokens "
        "a "
        "step, {} sequences)\n",
        all, engine.gpu_memory_utilization, BytesText(static_cast<uint64_t>(*r.flags.memory_bytes)),
        BytesText(r.workspace_bytes), engine.max_num_batched_tokens, engine.max_num_seqs);
  }
  if (!r.flags.rank) return out;
  out += Format("\nrank {}:\n{:>14}  {:<15} {:<15} tensor\n", *r.flags.rank, "bytes", "rows", "columns");
  for (const HeldTensor& tensor : r.tensors)
    out += Format("{:>14}  {:<15} {:<15} {}\n", tensor.bytes, SliceText(tensor.rows),
                  SliceText(tensor.columns), tensor.name);
  return out;
}

std::string SliceJson(Slice slice) {
  return Format("[{},{}]", slice.begin, slice.end);
}

std::string RankJson(const LayoutReport& r, const RankDemand& rank) {
  const RankShare& s = rank.share;
  const Topology& t = rank.topology;
  return Format(
      "{{\"rank\":{},\"dp\":{},\"tp\":{},\"ep\":{},\"moe_tp\":{},\"heads\":{},\"leaves\":{},\"experts\":{},"
      "\"expert_leaves\":{},\"shared_leaves\":{},\"embedding\":{},\"lm_head\":{},\"weight_bytes\":{}{}}}",
      t.rank(), t.dp_rank(), t.tp_rank(), t.moe_ep_rank(), t.moe_tp_rank(), SliceJson(s.heads),
      SliceJson(s.tensor_leaves), SliceJson(s.experts), SliceJson(s.expert_leaves),
      SliceJson(s.shared_leaves), SliceJson(s.embedding), SliceJson(s.head), rank.weight_bytes,
      r.flags.memory_bytes ? Format(",\"cache_tokens\":{}", rank.cache_tokens) : std::string());
}

std::string LayoutJson(const LayoutReport& r) {
  const Degrees& d = r.choice.degrees;
  std::string out = Format(
      "{{\"model\":{},\"scheme\":{},\"tensor_parallel_size\":{},\"data_parallel_size\":{},"
      "\"expert_parallel_size\":{},\"cache_bytes_per_token\":{},\"cache_bytes_per_block\":{},"
      "\"workspace_bytes\":{},\"ranks\":[",
      JsonQuote(r.subject.path), JsonQuote(r.subject.form), d.tp, d.dp, d.ep,
      r.block_bytes / static_cast<uint64_t>(r.flags.serve.engine.block_size), r.block_bytes,
      r.workspace_bytes);
  for (const RankDemand& rank : r.ranks) out += (rank.topology.rank() > 0 ? "," : "") + RankJson(r, rank);
  out += "]";
  if (r.flags.rank) {
    out += ",\"tensors\":[";
    for (const HeldTensor& tensor : r.tensors) {
      if (!out.ends_with('[')) out += ",";
      out += Format("{{\"name\":{},\"rows\":{},\"columns\":{},\"bytes\":{}}}", JsonQuote(tensor.name),
                    SliceJson(tensor.rows), SliceJson(tensor.columns), tensor.bytes);
    }
    out += "]";
  }
  return out + "}\n";
}

std::string RemarksText(const LayoutChoice& choice) {
  std::string out;
  for (const std::string& warning : choice.warnings) out += Format("warning: {}\n", warning);
  for (const std::string& note : choice.notes) out += Format("{}\n", note);
  return out;
}

}  // namespace

Result<std::string> Inspect(std::span<const std::string> arguments, const Variable& variable) {
  InspectFlags o;
  FlagTable table = Table(o);
  const std::string help = HelpText(table);
  ASSIGN_OR_RETURN(ParsedFlags parsed, ParseFlags(table, arguments));
  if (parsed.help) return help;
  RETURN_IF_ERROR(CheckEngineFlags(o.serve.engine, parsed));
  RETURN_IF_ERROR(CheckLayoutFlags(o.serve.parallel, o.serve.engine.additional_config));
  ASSIGN_OR_RETURN(Subject subject, OpenConfig(o.serve.engine.model));
  if (!o.layout && !o.rank) {
    RETURN_IF_ERROR(OpenWeights(o.serve.engine.quantization, "", subject));
    return Summary(subject, o.json);
  }
  ASSIGN_OR_RETURN(LayoutChoice choice, ChooseLayout(o.serve, subject.config, variable));
  RETURN_IF_ERROR(OpenWeights(choice.quantization, choice.quantization_source, subject));
  ASSIGN_OR_RETURN(const LayoutReport report, MakeLayout(subject, o, std::move(choice)));
  if (o.json) return LayoutJson(report);
  return RemarksText(report.choice) + LayoutText(report);
}

int RunInspect(std::span<const std::string> arguments) {
  const auto text = Inspect(arguments, [](const char* name) -> const char* { return std::getenv(name); });
  if (text) {
    fmt::print("{}", *text);
    return 0;
  }
  fmt::print(stderr, "tessera inspect: {}\n", text.error().message);
  return text.error().kind == ErrorKind::kInvalid ? 2 : 1;
}

}  // namespace tessera::cli
