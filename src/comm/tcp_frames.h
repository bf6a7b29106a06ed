// What stands on the links of a mesh, and the links. Internal to tcp_mesh.cc and remote_group.cc.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/net.h"
#include "comm/operation.h"
#include "comm/tcp_mesh.h"

namespace tessera {

// Both sides say this once, after the proof of the secret; the one that accepts answers last.
struct MeshHello {
  static constexpr std::array<char, 8> kMagic = {'t', 's', 'r', '-', 'm', 'e', 's', 'h'};
  static constexpr uint32_t kVersion = 1;
  std::array<char, 8> magic = kMagic;
  uint32_t version = kVersion;
  uint32_t world = 0;
  uint64_t epoch = 0;
  uint32_t rank = 0;      // who speaks
  uint32_t peer = 0;      // whom it takes the other for
  uint32_t accepted = 1;  // by the speaker
  uint32_t unused = 0;
};
static_assert(sizeof(MeshHello) == 40);

// Before every payload. A broken sender sends kBroken with a text, and nothing more.
struct FrameHeader {
  static constexpr uint32_t kMagic = 0x31727374;  // "tsr1"
  enum Kind : uint16_t { kPayload, kBroken };
  static constexpr size_t kMaxText = 1024;

  uint32_t magic = kMagic;
  uint16_t kind = kPayload;
  uint16_t channel = 0;
  uint64_t epoch = 0;
  Operation operation;
  uint64_t bytes = 0;  // of the payload that follows
};
static_assert(sizeof(FrameHeader) == 56);

struct TcpLink {
  static constexpr size_t kBufferBytes = 64 << 10;
  Socket socket;
  std::string name;  // "rank 5 (10.0.0.2:4000)"
  // What has been received and not yet taken: small frames come in one call, header and all.
  std::vector<std::byte> buffer;
  size_t begin = 0, end = 0;
  bool inside_frame = false;  // an error stopped us in the middle of sending one
};

struct TcpMesh::Content {
  int rank = 0;
  uint64_t epoch = 0;
  std::vector<TcpLink> links;  // [world]; closed for own node
  std::atomic<bool> aborted = false;
};

}  // namespace tessera
