// Control frames between the brain, node agents and ranks: a header of fixed size, then bytes. Knows nothing
// of what is in them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "base/error.h"
#include "base/net.h"

namespace tessera {

enum class FrameType : uint16_t {
  kHello = 1,  // node -> head: Hello
  kWelcome,    // head -> node: Welcome
  kRefuse,     // either: a text; the connection ends
  kSetup,      // head -> rank: RankSetup
  kListening,  // rank -> head: the text of its data endpoint
  kConnect,    // head -> rank: the data endpoints of all ranks
  kLoaded,     // rank -> head: RankLoaded
  kStart,      // head -> rank: number of cache blocks
  kReady,      // rank -> head: empty
  kStep,       // head -> rank: Step
  kOutput,     // rank -> head: RankReport
  kFailed,     // rank -> head: a text: what this rank cannot do
  kGone,       // agent -> head: a text: how the rank ended and its last words
  kStarted,    // agent -> head: process id
  kStop,       // head -> all: leave in order
  kLast = kStop,
};

inline constexpr uint16_t kAllRanks = 0xFFFF;
inline constexpr uint64_t kMaxFrameBytes = uint64_t{1} << 30;

struct Frame {
  FrameType type = FrameType::kStop;
  uint16_t rank = kAllRanks;
  std::vector<std::byte> bytes;
};

// One end of a connection that carries frames. Send from one thread at a time, receive from one thread at a
// time.
class FrameLink {
 public:
  FrameLink() = default;
  // A frame of another `epoch`, or longer than `max_bytes`, is an error.
  FrameLink(Socket socket, uint64_t epoch, uint64_t max_bytes = kMaxFrameBytes)
      : socket_(std::move(socket)), epoch_(epoch), max_bytes_(max_bytes) {}

  const Socket& socket() const { return socket_; }
  bool open() const { return socket_.open(); }
  void set_epoch(uint64_t epoch) { epoch_ = epoch; }

  Status Send(FrameType type, uint16_t rank, std::span<const std::byte> bytes, Deadline deadline) const;
  // What has arrived, without waiting: a frame, or nothing yet. kUnavailable when the other side closed.
  Result<std::optional<Frame>> TryReceive();
  Result<Frame> Receive(Deadline deadline);

 private:
  Socket socket_;
  uint64_t epoch_ = 0;
  uint64_t max_bytes_ = kMaxFrameBytes;
  std::vector<std::byte> buffer_;  // of the frame that is arriving
  size_t received_ = 0;
};

}  // namespace tessera
