// Every layout that a shape allows gives the bits of one rank: ranks as threads, on one node and on several,
// through shared memory and TCP.
#include <gtest/gtest.h>

#include "base/random.h"
#include "support/world.h"

namespace tessera::test {
namespace {

std::vector<Request> Requests(int num_tokens) {
  std::vector<Request> requests;
  RandomStream random(5, 1);
  for (const int length : {1, 2, 17, 90, 33, 5}) {
    Request request{.id = Format("of-{}", length),
                    .prompt = {},
                    .sampling = {.temperature = length % 2 == 0 ? 0.0f : 1.0f,
                                 .top_p = 0.9f,
                                 .seed = 5,
                                 .max_tokens = 10,
                                 .ignore_eos = true,
                                 .num_logprobs = 2,
                                 .num_prompt_logprobs = 0}};
    for (int i = 0; i < length; ++i) request.prompt.push_back(static_cast<int32_t>(random.Below(num_tokens)));
    requests.push_back(std::move(request));
  }
  return requests;
}

std::string HashWith(const LoadedModel& model, const Layout& layout, int budget, kernels::Isa isa,
                     bool mixed = false) {
  WorldOptions options{.isa = isa, .mixed_isas = mixed, .layout = layout, .engine = {}};
  options.engine = {.num_blocks = 40,
                    .block_size = 16,
                    .max_num_seqs = 4,
                    .max_num_batched_tokens = budget,
                    .max_model_len = 256};
  return HashAnswers(World(model, options).Run(Requests(model.num_tokens)));
}

kernels::Isa FastIsa() {
  return (*kernels::Choose(""))->isa;
}

// All (dp, tp, ep) of up to 16 ranks, of those degrees.
std::vector<Degrees> Allowed(const ModelConfig& config, const std::vector<int>& worlds) {
  std::vector<Degrees> allowed;
  for (const int world : worlds) {
    for (int tp = 1; tp <= world && world <= MaxRanks(); ++tp) {
      for (int ep = 1; ep <= world; ++ep) {
        const Degrees degrees{.dp = world / tp, .tp = tp, .ep = ep};
        if (world % tp != 0) continue;
        if (CheckDegrees(degrees, {.num_heads = config.num_heads, .num_experts = config.n_routed_experts}))
          allowed.push_back(degrees);
      }
    }
  }
  return allowed;
}

TEST(Layouts, TinyR1IsTheSameInAllOfThem) {
  const auto model = LoadModel(TinyR1Folder(), kTinyR1Tokens);
  const std::string expected = HashWith(*model, {}, 4096, FastIsa());
  int index = 0;
  for (const Degrees& degrees : Allowed(model->config, {2, 3, 4, 8, 16})) {
    // Budgets that cut prompts, and groups that are idle or hold fewer tokens than ranks.
    const int budget = std::vector<int>{8, 4096, 23}[index++ % 3];
    EXPECT_EQ(HashWith(*model, {.degrees = degrees}, budget, FastIsa()), expected)
        << DegreesText(degrees) << " budget " << budget;
  }
}

TEST(Layouts, NodesDoNotMatter) {
  const auto model = LoadModel(TinyR1Folder(), kTinyR1Tokens);
  const std::string expected = HashWith(*model, {}, 4096, FastIsa());
  const std::vector<Layout> layouts = {
      {.degrees = {.dp = 1, .tp = 2, .ep = 1}, .node_of_rank = {0, 1}},
      {.degrees = {.dp = 1, .tp = 4, .ep = 2}, .node_of_rank = {0, 0, 1, 1}},
      {.degrees = {.dp = 2, .tp = 2, .ep = 4}, .node_of_rank = {0, 0, 0, 1}},
      {.degrees = {.dp = 2, .tp = 2, .ep = 2}, .node_of_rank = {0, 1, 2, 3}},
      {.degrees = {.dp = 4, .tp = 1, .ep = 2}, .node_of_rank = {0, 1, 1, 1}},
      {.degrees = {.dp = 3, .tp = 1, .ep = 1}, .node_of_rank = {0, 1, 1}, .split_embedding = true},
      {.degrees = {.dp = 1, .tp = 4, .ep = 1}, .node_of_rank = {0, 0, 0, 0}, .split_embedding = true},
      {.degrees = {.dp = 4, .tp = 4, .ep = 4},
       .node_of_rank = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1}},
      {.degrees = {.dp = 1, .tp = 16, .ep = 1},
       .node_of_rank = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3}},
  };
  for (const Layout& layout : layouts) {
    if (layout.degrees.world() > MaxRanks()) continue;
    EXPECT_EQ(HashWith(*model, layout, 23, FastIsa(), true), expected) << LayoutText(layout);
  }
}

// Three dense layers, 12 heads, 8 and 32 experts, no dimension of tiny-r1's.
TEST(Layouts, OtherShapesAreTheSame) {
  for (const int experts : {8, 32}) {
    for (const RandomFormat format : {RandomFormat::kBf16, RandomFormat::kW8a8}) {
      const auto model = MakeTwelveHeadModel(format, experts);
      const std::string expected = HashWith(*model, {}, 4096, kernels::Isa::kScalar);
      int index = 0;
      for (const Degrees& degrees : Allowed(model->config, {2, 3, 4, 8, 16})) {
        if (++index % 3 != (experts + static_cast<int>(format)) % 3) continue;  // a third of them each
        EXPECT_EQ(HashWith(*model, {.degrees = degrees}, index % 2 == 0 ? 8 : 31, FastIsa()), expected)
            << DegreesText(degrees) << " experts " << experts;
      }
    }
  }
}

// What fails, fails with the same words everywhere.
TEST(Layouts, FailuresAreTheSame) {
  const auto model = MakeTwelveHeadModel(RandomFormat::kBf16, 8);
  model->config.routed_scaling_factor = 1e30f;
  const auto message = [&](const Degrees& degrees) {
    WorldOptions options{.isa = FastIsa(), .layout = {.degrees = degrees}, .engine = {}};
    options.engine = {.num_blocks = 10, .block_size = 16, .max_model_len = 128};
    World world(*model, options);
    const auto answers = world.Run({{.id = "doomed", .prompt = {1, 2, 3}, .sampling = {.eos_ids = {1}}}});
    EXPECT_EQ(answers[0].finish, FinishReason::kError);
    return answers[0].error.message;
  };
  const std::string expected = message({});
  EXPECT_NE(expected.find("layer 3: down_proj"), std::string::npos) << expected;
  for (const Degrees& degrees : std::vector<Degrees>{{1, 4, 1}, {2, 2, 1}, {2, 2, 4}, {2, 2, 2}, {3, 1, 1}}) {
    EXPECT_EQ(message(degrees), expected) << DegreesText(degrees);
  }
}

}  // namespace
}  // namespace tessera::test
