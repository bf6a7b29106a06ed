// What the frames say: plain values, to bytes and back. Decoders trust nothing: sizes are checked before
// memory is taken, indexes by whoever uses them (CheckStepShape).
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "cluster/rank_output.h"
#include "comm/communicator.h"
#include "comm/topology.h"
#include "model/step.h"

namespace tessera {

// What both sides of a cluster must agree on, in the order in which it is compared: name and value.
using Agreement = std::vector<std::pair<std::string, std::string>>;
// kInvalid names the first difference and both values.
Status CompareAgreements(const Agreement& head, const Agreement& node);

struct Hello {  // a node's agent to the head
  uint32_t first_rank = 0, num_ranks = 0;
  uint32_t process = 0;
  std::string name;          // for messages and metrics: host name and process
  std::string data_address;  // where its ranks listen
  Agreement agreement;
};
struct Welcome {
  std::string cluster;  // a random name, for the log
  uint64_t epoch = 0;
};

struct RankSetup {
  // The model and how it is cut.
  std::string model;
  std::string quantization;
  Degrees degrees;
  int32_t rank = 0;
  bool split_embedding = false;
  int32_t block_size = 0;
  int32_t max_model_len = 0;
  int32_t num_tokens = 0;  // ids that may be sampled
  // The machine.
  int32_t local_rank = 0, num_local = 1;
  int32_t threads = 1;
  int32_t decode_threads = 0;  // as RankOptions
  std::vector<int32_t> cores;  // to run on; empty: any
  std::string isa;             // forced instruction set, or empty
  int32_t log_level = 0;
  // The other ranks.
  std::vector<int32_t> node_of_rank;
  std::string data_address;  // to listen on; empty where there is one node
  std::string secret;
  uint64_t epoch = 0;
  int64_t deadline_ms = 0;  // of every exchange
};

struct RankLoaded {
  uint64_t weight_bytes = 0;
  uint64_t memory_bytes = 0;  // what this rank may use: its share of the host's
  std::string isa;
};

struct RankReport {
  RankOutput output;
  CommunicatorCounts counts{};
};

std::vector<std::byte> Encode(const Hello& hello);
std::vector<std::byte> Encode(const Welcome& welcome);
std::vector<std::byte> Encode(const RankSetup& setup);
std::vector<std::byte> Encode(const RankLoaded& loaded);
std::vector<std::byte> Encode(const RankReport& report);
std::vector<std::byte> Encode(const Step& step);
std::vector<std::byte> Encode(const std::vector<std::string>& texts);
std::vector<std::byte> EncodeText(std::string_view text);

// kInvalid when the bytes are not such a message.
Result<Hello> DecodeHello(std::span<const std::byte> bytes);
Result<Welcome> DecodeWelcome(std::span<const std::byte> bytes);
Result<RankSetup> DecodeRankSetup(std::span<const std::byte> bytes);
Result<RankLoaded> DecodeRankLoaded(std::span<const std::byte> bytes);
Result<RankReport> DecodeRankReport(std::span<const std::byte> bytes);
Result<Step> DecodeStep(std::span<const std::byte> bytes);
Result<std::vector<std::string>> DecodeTexts(std::span<const std::byte> bytes);
Result<std::string> DecodeText(std::span<const std::byte> bytes);

}  // namespace tessera
