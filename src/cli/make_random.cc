// See make_random.h. The flags of the dimensions come from the writer's own table.
#include "cli/make_random.h"

#include <unistd.h>

#include <charconv>
#include <cstdio>
#include <vector>

#include "base/format.h"
#include "cli/assembly.h"
#include "cli/flags.h"
#include "model/random_checkpoint.h"

namespace tessera::cli {
namespace {

struct RandomFlags {
  std::string folder;
  std::string preset = "toy";
  std::string format = "";
  int64_t seed = 0;
  bool noise = true;
  std::string tokenizer;
  int64_t max_shard_bytes = int64_t{4} << 30;
  std::string gguf;
  std::vector<std::string> dimensions;  // by RandomDimensions(); empty: the preset's
};

FlagTable Table(RandomFlags& o) {
  FlagTable table{
      .command = "tessera make-random",
      .summary = "Writes a random checkpoint into a new folder. The same seed gives the same bytes.",
      .positional_name = "DIR",
      .positional = &o.folder,
      .flags = {}};
  table.flags = {
      {"preset", "", TextFlag{&o.preset, {"toy", "odd", "r1-slice"}}, "where the dimensions start",
       "Checkpoint"},
      {"format", "", TextFlag{&o.format, {"bf16", "w8a8"}},
       "w8a8: the ModelSlim layout; empty: w8a8 for r1-slice and with --gguf, else bf16", "Checkpoint"},
      {"seed", "", IntFlag{&o.seed, 0, INT64_MAX}, "of every value", "Checkpoint"},
      {"noise", "", BoolFlag{&o.noise}, "norm weights around 1 instead of 1", "Checkpoint"},
      {"tokenizer", "", TextFlag{&o.tokenizer}, "folder whose tokenizer is copied; empty: bytes",
       "Checkpoint"},
      {"gguf", "", TextFlag{&o.gguf}, "also the same weights as this GGUF file, for llama.cpp", "Checkpoint"},
      {"max-shard-bytes", "", IntFlag{&o.max_shard_bytes, 4096, INT64_MAX, true}, "size of one file",
       "Checkpoint"},
  };
  const auto dimensions = RandomDimensions();
  o.dimensions.assign(dimensions.size(), "");
  for (size_t i = 0; i < dimensions.size(); ++i) {
    table.flags.push_back({std::string(dimensions[i].name), "", TextFlag{&o.dimensions[i]},
                           std::string(dimensions[i].help), "Dimensions (default: the preset's)"});
  }
  return table;
}

Status Write(const RandomFlags& o) {
  ASSIGN_OR_RETURN(RandomCheckpointOptions options, RandomPreset(o.preset));
  if (o.format == "w8a8" || (o.format.empty() && !o.gguf.empty())) options.format = RandomFormat::kW8a8;
  if (o.format == "bf16") options.format = RandomFormat::kBf16;
  options.gguf = o.gguf;
  options.seed = static_cast<uint64_t>(o.seed);
  options.noise = options.noise && o.noise;
  options.tokenizer_folder = o.tokenizer;
  options.max_shard_bytes = static_cast<uint64_t>(o.max_shard_bytes);
  for (size_t i = 0; i < o.dimensions.size(); ++i) {
    const std::string& text = o.dimensions[i];
    if (text.empty()) continue;
    double value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size()) {
      return Invalid("--{}: '{}' is not a number", RandomDimensions()[i].name, text);
    }
    RETURN_IF_ERROR(SetDimension(options, RandomDimensions()[i].name, value));
  }
  const bool terminal = isatty(STDERR_FILENO);
  ASSIGN_OR_RETURN(const RandomCheckpointSize size,
                   WriteRandomCheckpoint(o.folder, options, [&](uint64_t done, uint64_t total) {
                     if (terminal)
                       fmt::print(stderr, "\r  {} of {}\033[K{}", BytesText(done), BytesText(total),
                                  done == total ? "\n" : "");
                   }));
  fmt::print("{}: {:.1f} M parameters, {} ({}, seed {})\n", o.folder, size.num_parameters / 1e6,
             BytesText(size.num_bytes), options.format == RandomFormat::kW8a8 ? "w8a8" : "bf16", o.seed);
  if (!o.gguf.empty()) fmt::print("{}: {}\n", o.gguf, BytesText(size.num_gguf_bytes));
  return {};
}

}  // namespace

int RunMakeRandom(std::span<const std::string> arguments) {
  RandomFlags options;
  return RunCommand(Table(options), arguments, [&](const ParsedFlags&) -> Status {
    if (options.folder.empty()) return Invalid("no folder: `tessera make-random DIR`");
    return Write(options);
  });
}

}  // namespace tessera::cli
