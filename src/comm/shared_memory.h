// The memory that the ranks of one node share: a sealed memfd that the node agent makes, sized once, so that
// no dead peer can truncate it. Holds, per rank and channel, two buffers of data and the words of a barrier.
// Internal to comm/ but for Create, Attach and Abort.
#pragma once

#include <memory>
#include <string_view>

#include "base/error.h"

namespace tessera {

class SharedMemory {
 public:
  // A channel is what one communicator talks through; disjoint groups may share one.
  static constexpr int kNumChannels = 8;
  static constexpr int kMaxRanks = 256;

  // Makes the memfd for `num_ranks` local ranks: its descriptor is inherited by the ranks (it is not
  // close-on-exec), or attached by threads. The caller closes it. It costs no memory until it is used.
  static Result<int> Create(int num_ranks);
  // Maps it as local rank `local_rank`; refuses a descriptor that is not such a memory, or not sealed.
  // `spin`: cores are free, so waits spin for some microseconds before they sleep. The descriptor may be
  // closed afterwards. The node agent attaches, too, as any rank, to call Abort.
  static Result<std::unique_ptr<SharedMemory>> Attach(int descriptor, int local_rank, bool spin);
  // The same mapping for another rank of this process: ranks that are threads.
  std::unique_ptr<SharedMemory> ForRank(int local_rank) const;
  ~SharedMemory();

  int num_ranks() const;
  int local_rank() const;
  // Wakes every waiter of every rank with an error that says `why`: the world has broken, for good. Any
  // thread or process.
  void Abort(std::string_view why = "the world was aborted");

 private:
  friend class LocalGroup;
  struct Content;
  explicit SharedMemory(std::unique_ptr<Content> content);
  std::unique_ptr<Content> content_;
};

}  // namespace tessera
