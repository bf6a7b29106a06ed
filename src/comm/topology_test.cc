// Tables of ranks: the numbering, the placement of experts and the refusals of docs/parallel.md.
#include "comm/topology.h"

#include <gtest/gtest.h>

namespace tessera {
namespace {

TEST(Topology, SlicesCoverTheUnitsInOrder) {
  for (const int units : {0, 1, 3, 16, 17, 256}) {
    for (const int parts : {1, 2, 3, 5, 16, 20}) {
      int next = 0;
      for (int i = 0; i < parts; ++i) {
        const Slice slice = SliceOf(units, parts, i);
        EXPECT_EQ(slice.begin, next);
        EXPECT_LE(slice.size(), units / parts + 1);
        EXPECT_GE(slice.size(), units / parts);
        next = slice.end;
      }
      EXPECT_EQ(next, units);
    }
  }
  EXPECT_EQ(SliceOf(16, 3, 0), (Slice{0, 5}));
  EXPECT_EQ(SliceOf(16, 3, 1), (Slice{5, 10}));
  EXPECT_EQ(SliceOf(16, 3, 2), (Slice{10, 16}));
}

TEST(Topology, NumbersRanksTensorFastest) {
  const Topology rank({.dp = 4, .tp = 4, .ep = 4}, 6);
  EXPECT_EQ(rank.dp_rank(), 1);
  EXPECT_EQ(rank.tp_rank(), 2);
  EXPECT_EQ(rank.moe_ep_rank(), 1);
  EXPECT_EQ(rank.moe_tp_rank(), 2);
  EXPECT_EQ(rank.Experts(256), (Slice{64, 128}));
  EXPECT_EQ(rank.ExpertLeaves(16), (Slice{8, 12}));
  EXPECT_EQ(rank.SharedLeaves(16), (Slice{6, 7}));
  EXPECT_EQ(rank.Heads(128), (Slice{64, 96}));
  EXPECT_EQ(rank.Vocabulary(129280), (Slice{64640, 96960}));
}

TEST(Topology, PlacesExpertsByRankNotByGroup) {
  // dp 4, tp 2, ep 2: an expert set is four ranks, two groups.
  const Degrees degrees{.dp = 4, .tp = 2, .ep = 2};
  for (int rank = 0; rank < 8; ++rank) {
    const Topology topology(degrees, rank);
    EXPECT_EQ(topology.moe_ep_rank(), rank / 4);
    EXPECT_EQ(topology.moe_tp_rank(), rank % 4);
    for (int expert = 0; expert < 8; ++expert) {
      const Slice own = topology.Experts(8);
      EXPECT_EQ(topology.ExpertOwnerSet(expert, 8) == topology.moe_ep_rank(),
                expert >= own.begin && expert < own.end);
    }
  }
}

TEST(Topology, ModesFollowTheTable) {
  const auto mode = [](int dp, int tp, int ep) { return Topology({dp, tp, ep}, 0).mode(); };
  EXPECT_EQ(mode(1, 16, 1), MoeMode::kReduce);
  EXPECT_EQ(mode(1, 8, 8), MoeMode::kReduce);
  EXPECT_EQ(mode(8, 1, 8), MoeMode::kExchange);
  EXPECT_EQ(mode(4, 2, 8), MoeMode::kExchange);
  EXPECT_EQ(mode(8, 1, 4), MoeMode::kGather);
  EXPECT_EQ(mode(4, 4, 4), MoeMode::kGather);
  EXPECT_EQ(Topology({8, 1, 8}, 3).SharedLeaves(16), (Slice{0, 16}));
}

std::string Refusal(const Degrees& degrees) {
  const Status status = CheckDegrees(degrees, {.num_heads = 12, .num_experts = 8, .num_leaves = 16});
  return status ? "" : status.error().message;
}

TEST(Topology, RefusesWhatTheShapeCannotHold) {
  EXPECT_EQ(Refusal({.dp = 3, .tp = 4, .ep = 4}), "");
  EXPECT_NE(
      Refusal({.dp = 1, .tp = 8, .ep = 1}).find("heads (12) must be divisible by tensor parallel size (8)"),
      std::string::npos);
  EXPECT_NE(Refusal({.dp = 1, .tp = 3, .ep = 1}).find("must divide 16"), std::string::npos);
  EXPECT_NE(Refusal({.dp = 3, .tp = 2, .ep = 4}).find("must divide the number of ranks, 6"),
            std::string::npos);
  EXPECT_NE(Refusal({.dp = 3, .tp = 1, .ep = 3}).find("routed experts, 8"), std::string::npos);
  EXPECT_NE(Refusal({.dp = 0, .tp = 1, .ep = 1}).find("data parallel size 0"), std::string::npos);
}

}  // namespace
}  // namespace tessera
