// The memory that the ranks of one node share: a sealed memfd that the node agent makes, sized once, so that no
// dead peer can truncate it. Holds, per rank and channel, two buffers of data and the words of a barrier.
// Internal to comm/ but for Create and Attach.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "base/error.h"

namespace tessera {

class SharedMemory {
 public:
  // Makes the memfd for `num_ranks` local ranks: its descriptor is inherited by the ranks, or attached by
  // threads. The caller closes it.
  static Result<int> Create(int num_ranks);
  // Maps it as local rank `local_rank`; refuses a descriptor that is not such a memory, or not sealed. `spin`:
  // cores are free, so waits spin for some microseconds before they sleep.
  static Result<std::unique_ptr<SharedMemory>> Attach(int descriptor, int local_rank, bool spin);
  ~SharedMemory();

  int num_ranks() const;
  int local_rank() const;
  // Wakes every waiter of every rank with an error that says why: the world has broken. Any thread or process.
  void Abort();

 private:
  friend class LocalGroup;
  struct Content;
  explicit SharedMemory(std::unique_ptr<Content> content);
  std::unique_ptr<Content> content_;
};

}  // namespace tessera
