// Framing on a non-blocking socket.
#include "cluster/frame.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/bytes.h"

namespace tessera {
namespace {

constexpr uint32_t kMagic = 0x31535354;  // "TSS1"

struct Header {
  uint32_t magic = kMagic;
  uint16_t type = 0;
  uint16_t rank = 0;
  uint64_t epoch = 0;
  uint64_t size = 0;
};
static_assert(sizeof(Header) == 24);

// Room grows with what has come, not with what was announced.
constexpr size_t kPieceBytes = size_t{1} << 20;

}  // namespace

Status FrameLink::Send(FrameType type, uint16_t rank, std::span<const std::byte> bytes,
                       Deadline deadline) const {
  const Header header{
      .type = static_cast<uint16_t>(type), .rank = rank, .epoch = epoch_, .size = bytes.size()};
  std::vector<std::byte> frame(sizeof header + bytes.size());
  std::memcpy(frame.data(), &header, sizeof header);
  std::ranges::copy(bytes, frame.begin() + sizeof header);
  return WriteAll(socket_, frame, deadline);
}

Result<std::optional<Frame>> FrameLink::TryReceive() {
  Header header;
  for (;;) {
    size_t wanted = sizeof header;
    if (received_ >= sizeof header) {
      std::memcpy(&header, buffer_.data(), sizeof header);
      if (header.magic != kMagic) {
        return Fail(ErrorKind::kUnavailable, "a frame starts with {:#x}, {:#x} is wanted", header.magic,
                    kMagic);
      }
      if (header.epoch != epoch_) {
        return Fail(ErrorKind::kUnavailable, "a frame is of epoch {:x}, this is epoch {:x}", header.epoch,
                    epoch_);
      }
      if (header.type == 0 || header.type > static_cast<uint16_t>(FrameType::kLast) ||
          header.size > max_bytes_) {
        return Fail(ErrorKind::kUnavailable, "a frame of type {} with {} bytes is not understood",
                    header.type, header.size);
      }
      wanted += header.size;
      if (received_ == wanted) break;
    }
    buffer_.resize(std::min(wanted, received_ + kPieceBytes));
    const ssize_t got =
        recv(socket_.descriptor(), buffer_.data() + received_, buffer_.size() - received_, MSG_DONTWAIT);
    if (got == 0) return Fail(ErrorKind::kUnavailable, "the other side closed the connection");
    if (got < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) return std::nullopt;
      return Fail(ErrorKind::kUnavailable, "the connection broke: {}", std::strerror(errno));
    }
    received_ += static_cast<size_t>(got);
  }
  Frame frame{.type = static_cast<FrameType>(header.type),
              .rank = header.rank,
              .bytes = {buffer_.begin() + sizeof header, buffer_.begin() + static_cast<int64_t>(received_)}};
  received_ = 0;
  buffer_.clear();
  return frame;
}

Result<Frame> FrameLink::Receive(Deadline deadline) {
  for (;;) {
    ASSIGN_OR_RETURN(std::optional<Frame> frame, TryReceive());
    if (frame) return *std::move(frame);
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
    if (left.count() <= 0) return Fail(ErrorKind::kDeadline, "no answer came in time");
    pollfd wait{.fd = socket_.descriptor(), .events = POLLIN, .revents = 0};
    poll(&wait, 1, static_cast<int>(std::min<int64_t>(left.count() + 1, 60'000)));
  }
}

}  // namespace tessera
