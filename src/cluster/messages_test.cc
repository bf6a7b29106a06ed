// What is written comes back, what is cut or padded is refused, and outputs of ranks fit together or are
// refused.
#include "cluster/messages.h"

#include <gtest/gtest.h>

#include <thread>

#include "cluster/frame.h"

namespace tessera {
namespace {

Step SomeStep() {
  Step step{.number = 7, .groups = {}};
  step.groups.resize(3);
  GroupStep& group = step.groups[1];
  group.zero_blocks = {4};
  group.tokens = {1, 2, 3};
  group.sequences = {{.num_tokens = 2, .num_blocks = 1},
                     {.first_token = 2, .num_tokens = 1, .first_block = 1, .num_blocks = 1}};
  group.block_ids = {4, 5};
  group.rows = {{.token = 1, .sampling = 0}, {.token = 2, .target = 9, .num_logprobs = 2}};
  group.sampling = {{.temperature = 0.5f, .seed = ~uint64_t{0}, .mask_begin = 0}};
  group.counts = {{1, 2, 3}};
  group.biases = {{4, -1.5f}};
  group.token_lists = {8, 9};
  group.masks = {0xFFFFFFFF};
  return step;
}

RankReport SomeReport() {
  RankReport report;
  report.output.failures = {"", "layer 3: down_proj"};
  report.output.rows = {{0, {.token = 5, .logprob = -0.5f, .top = {{5, -0.5f}, {6, -1.0f}}}}, {1, {}}};
  report.counts[2] = {.calls = 3, .bytes = 4, .wire_bytes = 5};
  return report;
}

RankSetup SomeSetup() {
  RankSetup setup{.model = "a/model", .degrees = {.dp = 2, .tp = 2, .ep = 4}, .rank = 3};
  setup.cores = {1, 2};
  setup.threads = 2;
  setup.decode_threads = 1;
  setup.node_of_rank = {0, 0, 1, 1};
  setup.secret = std::string("with\0zero", 9);
  setup.epoch = 99;
  return setup;
}

TEST(Messages, ComeBackAsTheyWere) {
  const Step step = DecodeStep(Encode(SomeStep())).value();
  EXPECT_EQ(Encode(step), Encode(SomeStep()));
  EXPECT_EQ(step.groups[1].sampling[0].seed, ~uint64_t{0});
  EXPECT_EQ(step.groups[1].rows[1].target, 9);
  const RankReport report = DecodeRankReport(Encode(SomeReport())).value();
  EXPECT_EQ(report.output.rows[0].output.top[1].logprob, -1.0f);
  EXPECT_EQ(report.output.failures[1], "layer 3: down_proj");
  EXPECT_EQ(report.counts[2].wire_bytes, 5u);
  const RankSetup setup = DecodeRankSetup(Encode(SomeSetup())).value();
  EXPECT_EQ(setup.secret, SomeSetup().secret);
  EXPECT_EQ(setup.degrees, SomeSetup().degrees);
  EXPECT_EQ(setup.threads, 2);
  EXPECT_EQ(setup.decode_threads, 1);
  const Hello hello = DecodeHello(Encode(Hello{.first_rank = 4, .agreement = {{"a", "1"}}})).value();
  EXPECT_EQ(hello.agreement[0].second, "1");
}

template <typename Decode>
void ExpectRefusals(std::vector<std::byte> bytes, const Decode& decode) {
  for (size_t size = 0; size < bytes.size(); ++size)
    EXPECT_FALSE(decode(std::span(bytes).first(size))) << size << " of " << bytes.size();
  bytes.push_back({});
  EXPECT_FALSE(decode(bytes));
}

TEST(Messages, CutOrPaddedOnesAreRefused) {
  ExpectRefusals(Encode(SomeStep()), DecodeStep);
  ExpectRefusals(Encode(SomeReport()), DecodeRankReport);
  ExpectRefusals(Encode(SomeSetup()), DecodeRankSetup);
  ExpectRefusals(Encode(Hello{.name = "n", .agreement = {{"a", "1"}}}), DecodeHello);
}

TEST(Messages, HugeCountsTakeNoMemory) {
  std::vector<std::byte> bytes = Encode(std::vector<std::string>{"a"});
  std::fill_n(bytes.begin(), 8, std::byte{0xFF});
  EXPECT_FALSE(DecodeTexts(bytes));
}

TEST(Messages, DifferencesNameBothValues) {
  const Agreement head = {{"version", "1"}, {"--block-size", "128"}};
  EXPECT_TRUE(CompareAgreements(head, head));
  const Status differs = CompareAgreements(head, {{"version", "1"}, {"--block-size", "64"}});
  EXPECT_EQ(differs.error().message, "--block-size differs: '128' on the head, '64' on the node");
  EXPECT_FALSE(CompareAgreements(head, {{"version", "1"}}));
  EXPECT_FALSE(CompareAgreements(head, {{"version", "1"}, {"other", "128"}}));
}

TEST(Frames, ArriveInPiecesAndInOrder) {
  auto ends = SocketPair().value();
  const FrameLink sender(std::move(ends.first), 5);
  FrameLink receiver(std::move(ends.second), 5);
  EXPECT_FALSE(receiver.TryReceive()->has_value());
  const std::vector<std::byte> large(3 << 20, std::byte{7});
  std::thread writer([&] {
    EXPECT_TRUE(sender.Send(FrameType::kStep, 2, large, After(std::chrono::seconds(10))));
    EXPECT_TRUE(sender.Send(FrameType::kStop, kAllRanks, {}, After(std::chrono::seconds(10))));
  });
  const Frame first = receiver.Receive(After(std::chrono::seconds(10))).value();
  EXPECT_EQ(first.bytes, large);
  EXPECT_EQ(first.rank, 2);
  EXPECT_EQ(receiver.Receive(After(std::chrono::seconds(10)))->type, FrameType::kStop);
  writer.join();
  EXPECT_EQ(receiver.Receive(After(std::chrono::milliseconds(1))).error().kind, ErrorKind::kDeadline);
  sender.socket().Shutdown();
  EXPECT_EQ(receiver.TryReceive().error().kind, ErrorKind::kUnavailable);
}

TEST(Frames, OtherEpochsSizesAndNoiseAreRefused) {
  const auto seen = [](uint64_t epoch, std::span<const std::byte> noise, size_t size) {
    auto ends = SocketPair().value();
    const FrameLink sender(std::move(ends.first), epoch);
    FrameLink receiver(std::move(ends.second), 5, 100);
    EXPECT_TRUE(WriteAll(sender.socket(), noise, After(std::chrono::seconds(1))));
    EXPECT_TRUE(
        sender.Send(FrameType::kStep, 0, std::vector<std::byte>(size), After(std::chrono::seconds(1))));
    const auto frame = receiver.Receive(After(std::chrono::seconds(1)));
    return frame ? "" : frame.error().message;
  };
  EXPECT_EQ(seen(5, {}, 100), "");
  EXPECT_NE(seen(6, {}, 1).find("epoch 6, this is epoch 5"), std::string::npos);
  EXPECT_NE(seen(5, {}, 101).find("101 bytes"), std::string::npos);
  EXPECT_NE(seen(5, std::vector<std::byte>(30, std::byte{9}), 1).find("0x9090909"), std::string::npos);
}

RankOutput OutputOf(std::vector<int32_t> rows, std::vector<std::string> failures = {"", ""}) {
  RankOutput output{.rows = {}, .failures = std::move(failures)};
  for (const int32_t row : rows) output.rows.push_back({row, {.token = 100 + row}});
  return output;
}

Result<StepOutput> Merge(RankOutput first, RankOutput second) {
  Step step = SomeStep();
  step.groups = {step.groups[1]};
  std::vector<RankOutput> outputs = {std::move(first), std::move(second)};
  return MergeOutputs(step, {.dp = 1, .tp = 2, .ep = 1}, outputs);
}

TEST(RankOutputs, FitTogetherInAnyOrder) {
  const StepOutput output = Merge(OutputOf({1}), OutputOf({0})).value();
  EXPECT_EQ(output.groups[0].rows[0].token, 100);
  EXPECT_EQ(output.groups[0].rows[1].token, 101);
  const StepOutput failed = Merge(OutputOf({1}), OutputOf({0}, {"", "bad"})).value();
  EXPECT_EQ(failed.groups[0].failures[1], "bad");
  EXPECT_EQ(failed.groups[0].rows[1].token, -1);
  EXPECT_EQ(failed.groups[0].rows[0].token, 100);
}

TEST(RankOutputs, OfAnotherShapeAreRefused) {
  const auto refusal = [](RankOutput first, RankOutput second) {
    const auto output = Merge(std::move(first), std::move(second));
    return output ? "" : output.error().message;
  };
  EXPECT_EQ(refusal(OutputOf({1}), OutputOf({})), "no rank of group 0 answered row 0");
  EXPECT_EQ(refusal(OutputOf({1}), OutputOf({1})), "rank 1 answered row 1, which is answered already");
  EXPECT_EQ(refusal(OutputOf({2}), OutputOf({0})), "rank 0 answered row 2, which is not in the step");
  EXPECT_EQ(refusal(OutputOf({-1}), OutputOf({0})), "rank 0 answered row -1, which is not in the step");
  EXPECT_EQ(refusal(OutputOf({1}), OutputOf({0}, {""})), "rank 1 answered for 1 sequences, the step has 2");
}

}  // namespace
}  // namespace tessera
