// The promise of docs/numerics.md as one hash: the same requests give the same token ids and logprob bits
// whatever shares the step with them, however prompts are cut, what the prefix cache holds, who is preempted,
// on every thread count, instruction set and layout of ranks. CI runs a pairwise cover. TESSERA_HASH has
// words that choose other cells: "full" (the whole product: hours, most of them of the plain reference), a
// set like "avx512" or "mixed" (ranks differ), "one-rank" (no sockets, for ./dev emulate), "from=700" (that
// cell and those behind it, to go on where a run stopped).
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <set>
#include <sstream>

#include "base/file.h"
#include "base/random.h"
#include "support/golden.h"
#include "support/world.h"

namespace tessera::test {
namespace {

constexpr int kBlockSize = 16;

struct Cell {
  int batch = 1;   // sequences that may run together; 64: with unrelated requests beside them
  int chunk = 0;   // tokens of a prompt per step, 0: no limit
  int prefix = 0;  // 0 cold, 1 warm, 2 partly evicted
  bool preempt = false;
  int threads = 1;
  kernels::Isa isa = kernels::Isa::kScalar;
  bool mixed_isas = false;  // ranks of one world have different ones
  Degrees degrees;
};

constexpr int kMixedIsas = 4;
// One of each mode; layout_test.cc has all of them.
const std::vector<Degrees> kLayouts = {{1, 1, 1}, {1, 2, 1}, {3, 1, 1}, {2, 2, 2}, {2, 2, 4}, {4, 4, 4}};
const std::vector<std::vector<int>> kAxes = {
    {1, 2, 7, 64}, {0, 1, 64, 300}, {0, 1, 2}, {0, 1}, {1, 2}, {0, 1, 2, 3, kMixedIsas}, {0, 1, 2, 3, 4, 5}};

Cell MakeCell(const std::vector<int>& choice) {
  return {
      .batch = kAxes[0][choice[0]],
      .chunk = kAxes[1][choice[1]],
      .prefix = kAxes[2][choice[2]],
      .preempt = kAxes[3][choice[3]] == 1,
      .threads = kAxes[4][choice[4]],
      .isa = choice[5] == kMixedIsas ? kernels::Isa::kScalar : static_cast<kernels::Isa>(kAxes[5][choice[5]]),
      .mixed_isas = choice[5] == kMixedIsas,
      .degrees = kLayouts[kAxes[6][choice[6]]]};
}

std::string_view IsaOf(const Cell& cell) {
  return cell.mixed_isas ? "mixed" : kernels::IsaName(cell.isa);
}

std::string Name(const Cell& cell) {
  return Format("batch {} chunk {} prefix {} preempt {} threads {} isa {} {}", cell.batch, cell.chunk,
                std::vector<const char*>{"cold", "warm", "evicted"}[cell.prefix], cell.preempt, cell.threads,
                IsaOf(cell), DegreesText(cell.degrees));
}

std::vector<int32_t> RandomTokens(uint64_t seed, int count) {
  RandomStream random(seed, 77);
  std::vector<int32_t> tokens(count);
  for (int32_t& token : tokens) token = 3 + static_cast<int32_t>(random.Below(1700));
  return tokens;
}

// Greedy and sampled, short and long, with every setting that may depend on its surroundings.
std::vector<Request> FixedRequests() {
  static const auto golden =
      LoadGolden(std::string(TESSERA_SOURCE_DIR) + "/tests/golden/tiny_r1_small.safetensors", "w8a8");
  const auto prefix_of = [&](int sequence, size_t count) {
    const std::vector<int32_t>& ids = golden[sequence].ids;
    return std::vector<int32_t>(ids.begin(), ids.begin() + std::min(count, ids.size()));
  };
  std::vector<int32_t> shared;
  for (int i = 0; shared.size() < 330; i = (i + 1) % 3)
    shared.insert(shared.end(), golden[i].ids.begin(), golden[i].ids.end());
  shared.resize(330);
  std::vector<Request> requests(7);
  requests[0] = {.id = "greedy",
                 .prompt = prefix_of(0, 20),
                 .sampling = {.temperature = 0, .max_tokens = 24, .num_logprobs = 3}};
  requests[1] = {
      .id = "sampled",
      .prompt = prefix_of(1, 30),
      .sampling = {.temperature = 0.8f, .top_p = 0.9f, .seed = 11, .max_tokens = 20, .num_logprobs = 0}};
  requests[2] = {
      .id = "long",
      .prompt = shared,
      .sampling = {.temperature = 0, .max_tokens = 8, .num_logprobs = 1, .num_prompt_logprobs = 1}};
  requests[3] = {.id = "branches",
                 .prompt = {shared.begin(), shared.begin() + 210},
                 .num_choices = 2,
                 .sampling = {.temperature = 1,
                              .repetition_penalty = 1.1f,
                              .frequency_penalty = 0.2f,
                              .presence_penalty = 0.1f,
                              .seed = 12,
                              .max_tokens = 16,
                              .num_logprobs = 2}};
  requests[4] = {.id = "one",
                 .prompt = {0},
                 .sampling = {.temperature = 1.3f,
                              .top_k = 20,
                              .min_p = 0.02f,
                              .seed = ~uint64_t{0},
                              .max_tokens = 24,
                              .num_logprobs = 0}};
  requests[5] = {.id = "biased",
                 .prompt = prefix_of(2, 41),
                 .sampling = {.temperature = 0.6f,
                              .top_p = 0.95f,
                              .seed = 13,
                              .max_tokens = 18,
                              .min_tokens = 9,
                              .logit_bias = {{5, 2.5f}, {100, -100.0f}},
                              .bad_words = {{17}, {30, 31}},
                              .num_logprobs = 5}};
  requests[6] = {
      .id = "noise",
      .prompt = RandomTokens(3, 97),
      .sampling = {.temperature = 1, .seed = 14, .max_tokens = 10, .ignore_eos = true, .num_logprobs = 0}};
  for (Request& request : requests) request.sampling.eos_ids = {1};
  return requests;
}

// Requests whose answers nobody reads.
std::vector<Request> Strangers(int count, int prompt_tokens) {
  std::vector<Request> strangers;
  for (int i = 0; i < count; ++i) {
    strangers.push_back(
        {.id = Format("stranger-{}", i),
         .prompt = RandomTokens(1000 + i, prompt_tokens + i % 7),
         .sampling = {
             .temperature = 1, .seed = static_cast<uint64_t>(i), .max_tokens = 5, .ignore_eos = true}});
  }
  return strangers;
}

std::string HashOf(const Cell& cell, const LoadedModel& model) {
  const std::vector<Request> fixed = FixedRequests();
  WorldOptions options{.isa = cell.isa,
                       .mixed_isas = cell.mixed_isas,
                       .num_threads = cell.threads,
                       .decode_threads = cell.preempt ? 1 : 0,
                       .layout = {.degrees = cell.degrees},
                       .engine = {}};
  options.engine.block_size = kBlockSize;
  options.engine.max_num_seqs = cell.batch;
  options.engine.max_model_len = 512;
  options.engine.max_num_batched_tokens = cell.chunk == 0 ? 4096 : std::max(cell.chunk, cell.batch);
  options.engine.enable_prefix_caching = cell.prefix != 0;
  // The longest request alone needs 22 blocks.
  options.engine.num_blocks = cell.preempt ? 25 : 400;
  World world(model, options);
  std::vector<Request> together = fixed;
  if (cell.batch == 64) {
    for (Request& stranger : Strangers(56, 9)) together.push_back(std::move(stranger));
    std::rotate(together.begin(), together.begin() + 30, together.end());
  }
  if (cell.preempt) {
    // Strangers that grow for long beside everybody: admission fills the small pool, growth takes blocks
    // back. They must last while a prompt comes token by token.
    std::vector<Request> growing = Strangers(3, 5);
    for (Request& stranger : growing) {
      stranger.id += "-growing";
      stranger.sampling.max_tokens = cell.chunk == 1 ? 200 : 90;
      together.insert(together.begin(), std::move(stranger));
    }
  }
  if (cell.prefix != 0) world.Run(together);
  if (cell.prefix == 2) world.Run(Strangers(cell.preempt ? 3 : 40, 90));
  std::vector<Answer> answers = world.Run(together);

  std::vector<Answer> read;
  size_t at = 0;
  std::vector<std::vector<Answer>> by_request(fixed.size());
  for (const Request& request : together) {
    const auto same =
        std::find_if(fixed.begin(), fixed.end(), [&](const Request& f) { return f.id == request.id; });
    for (int choice = 0; choice < request.num_choices; ++choice, ++at) {
      if (same != fixed.end()) by_request[same - fixed.begin()].push_back(answers[at]);
    }
  }
  for (std::vector<Answer>& of_request : by_request) {
    for (Answer& answer : of_request) {
      EXPECT_NE(answer.finish, FinishReason::kError) << answer.error.message;
      read.push_back(std::move(answer));
    }
  }
  // With a warm cache in small pieces, or several groups, the pool may suffice.
  if (cell.preempt && cell.batch >= 7 && cell.prefix == 0 && cell.degrees.dp == 1) {
    EXPECT_GT(world.engine().Stats().num_preemptions, 0u) << Name(cell);
  }
  return HashAnswers(read);
}

// Rows such that every pair of values of two axes occurs in some row: greedy, seeded.
std::vector<std::vector<int>> PairwiseCover(uint64_t seed) {
  std::set<std::array<int, 4>> open;  // axis, value, later axis, value
  for (int a = 0; a < static_cast<int>(kAxes.size()); ++a) {
    for (int b = a + 1; b < static_cast<int>(kAxes.size()); ++b) {
      for (int x = 0; x < static_cast<int>(kAxes[a].size()); ++x) {
        for (int y = 0; y < static_cast<int>(kAxes[b].size()); ++y) open.insert({a, x, b, y});
      }
    }
  }
  const auto covered_by = [](const std::vector<int>& row) {
    std::vector<std::array<int, 4>> pairs;
    for (int a = 0; a < static_cast<int>(row.size()); ++a) {
      for (int b = a + 1; b < static_cast<int>(row.size()); ++b) pairs.push_back({a, row[a], b, row[b]});
    }
    return pairs;
  };
  RandomStream random(seed, 5);
  std::vector<std::vector<int>> rows;
  while (!open.empty()) {
    std::vector<int> best;
    size_t best_new = 0;
    for (int attempt = 0; attempt < 200; ++attempt) {
      std::vector<int> row;
      for (const auto& axis : kAxes) row.push_back(static_cast<int>(random.Below(axis.size())));
      size_t fresh = 0;
      for (const auto& pair : covered_by(row)) fresh += open.count(pair);
      if (fresh > best_new) best = row, best_new = fresh;
    }
    if (best.empty()) continue;
    for (const auto& pair : covered_by(best)) open.erase(pair);
    rows.push_back(best);
  }
  return rows;
}

std::vector<std::vector<int>> WholeProduct() {
  std::vector<std::vector<int>> rows = {{}};
  for (const auto& axis : kAxes) {
    std::vector<std::vector<int>> longer;
    for (const auto& row : rows) {
      for (int value = 0; value < static_cast<int>(axis.size()); ++value) {
        longer.push_back(row);
        longer.back().push_back(value);
      }
    }
    rows = std::move(longer);
  }
  return rows;
}

// What TESSERA_HASH asks for.
struct Choice {
  bool given = false;
  bool full = false;
  bool one_rank = false;
  std::string set;  // empty: all
  size_t from = 1;
};

Choice ReadChoice() {
  Choice choice;
  const char* variable = std::getenv("TESSERA_HASH");
  std::istringstream words(variable == nullptr ? "" : variable);
  for (std::string word; words >> word; choice.given = true) {
    if (word == "full") {
      choice.full = true;
    } else if (word == "one-rank") {
      choice.one_rank = true;
    } else if (word.starts_with("from=")) {
      choice.from = std::max(1ul, std::strtoul(word.c_str() + 5, nullptr, 10));
    } else {
      choice.set = word;
    }
  }
  return choice;
}

TEST(Hash, IsTheSameEverywhere) {
  const auto model = LoadModel(TinyR1Folder(), kTinyR1Tokens);
  const auto stored = ReadFile(std::string(TESSERA_SOURCE_DIR) + "/tests/golden/tiny_r1_hash.txt");
  ASSERT_TRUE(stored) << stored.error().message;
  const std::string expected = stored->substr(0, 64);
  const Choice choice = ReadChoice();
  if (choice.set.empty()) {
    ASSERT_EQ(HashOf({}, *model), expected) << "the plain reference";
  }

  const std::vector<std::vector<int>> rows = choice.full ? WholeProduct() : PairwiseCover(1);
  int tested = 0;
  for (size_t i = choice.from - 1; i < rows.size(); ++i) {
    const Cell cell = MakeCell(rows[i]);
    if (!kernels::ForIsa(cell.isa) || cell.degrees.world() > MaxRanks()) continue;
    if (MaxRanks() < 16 && i % 4 != 0) continue;  // under a sanitizer a part must do
    if (!choice.set.empty() && choice.set != IsaOf(cell)) continue;
    if (choice.one_rank && (cell.degrees.world() > 1 || cell.mixed_isas)) continue;
    if (choice.given) {
      std::printf("%zu of %zu: %s\n", i + 1, rows.size(), Name(cell).c_str());
      std::fflush(stdout);
    }
    ++tested;
    EXPECT_EQ(HashOf(cell, *model), expected) << Name(cell);
  }
  std::printf("%d of %zu cells\n", tested, rows.size());
  EXPECT_GT(tested, 0) << "TESSERA_HASH names no cell of this CPU";
}

// Other shapes: every instruction set and both schemes give what the plain reference gives.
std::string OddHash(const LoadedModel& model, kernels::Isa isa, int threads, int budget) {
  std::vector<Request> requests;
  for (const int length : {1, 2, 17, 90, 33}) {
    const std::vector<int32_t> tokens = RandomTokens(length, length);
    Request request{.id = Format("odd-{}", length),
                    .prompt = {},
                    .sampling = {.temperature = 1,
                                 .top_p = 0.9f,
                                 .seed = 5,
                                 .max_tokens = 12,
                                 .ignore_eos = true,
                                 .num_logprobs = 2,
                                 .num_prompt_logprobs = 0}};
    for (const int32_t token : tokens) request.prompt.push_back(token % model.config.vocab_size);
    requests.push_back(std::move(request));
  }
  WorldOptions options{.isa = isa, .num_threads = threads, .engine = {}};
  options.engine.block_size = kBlockSize;
  options.engine.max_model_len = 256;
  options.engine.max_num_batched_tokens = budget;
  options.engine.max_num_seqs = 5;
  options.engine.num_blocks = 100;
  return HashAnswers(World(model, options).Run(requests));
}

TEST(Hash, IsTheSameForOddShapes) {
  for (const RandomFormat format : {RandomFormat::kBf16, RandomFormat::kW8a8}) {
    const auto model = MakeOddModel(format);
    const std::string expected = OddHash(*model, kernels::Isa::kScalar, 1, 4096);
    for (const int isa : {0, 1, 2, 3}) {
      if (!kernels::ForIsa(static_cast<kernels::Isa>(isa))) continue;
      for (const int threads : {1, 2}) {
        for (const int budget : {5, 31}) {
          EXPECT_EQ(OddHash(*model, static_cast<kernels::Isa>(isa), threads, budget), expected)
              << kernels::IsaName(static_cast<kernels::Isa>(isa)) << " " << threads << " " << budget;
        }
      }
    }
  }
}

// A model whose expert terms leave the range of fixed point: the request ends with an error that names the
// layer.
TEST(Hash, OutOfRangeTermsAreErrorsNotData) {
  const auto model = MakeOddModel(RandomFormat::kBf16);
  model->config.routed_scaling_factor = 1e30f;
  for (const int isa : {0, 1, 2, 3}) {
    if (!kernels::ForIsa(static_cast<kernels::Isa>(isa))) continue;
    WorldOptions options{.isa = static_cast<kernels::Isa>(isa), .engine = {}};
    options.engine = {.num_blocks = 10, .block_size = kBlockSize, .max_model_len = 128};
    World world(*model, options);
    const std::vector<Answer> answers =
        world.Run({{.id = "doomed", .prompt = {1, 2, 3}, .sampling = {.eos_ids = {1}}}});
    EXPECT_EQ(answers[0].finish, FinishReason::kError);
    EXPECT_EQ(answers[0].error.kind, ErrorKind::kInternal);
    EXPECT_NE(answers[0].error.message.find("layer 1: down_proj"), std::string::npos)
        << answers[0].error.message;
    EXPECT_EQ(world.engine().Stats().num_blocks_used, 0);
  }
}

}  // namespace
}  // namespace tessera::test
