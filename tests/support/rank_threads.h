// A world of ranks as threads of this process: the communicators and the model are the real ones, only the
// processes are not.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "base/net.h"
#include "cluster/rank.h"
#include "engine/executor.h"
#include "model/checkpoint.h"

namespace tessera::test {

struct Layout {
  Degrees degrees;
  std::vector<int> node_of_rank;  // empty: one node
  bool split_embedding = false;
};
std::string LayoutText(const Layout& layout);
// How many ranks a test may have: 16, or 4 where a sanitizer makes each of them slow.
int MaxRanks();

class RankThreads : public Executor {
 public:
  // `table_of(rank)` chooses its instruction set. Everything outlives the object. Ends the test program when
  // a rank cannot be made.
  RankThreads(const Checkpoint& checkpoint, const ModelConfig& config, const Layout& layout,
              const RankOptions& options, int threads_per_rank,
              std::function<const kernels::Kernels*(int rank)> table_of);
  ~RankThreads() override;
  Result<StepOutput> Run(const Step& step) override;

 private:
  void RunRank(int rank, int memory_descriptor, int local_rank);

  const Checkpoint& checkpoint_;
  const ModelConfig& config_;
  const Layout layout_;
  const RankOptions options_;
  const int threads_per_rank_;
  const std::function<const kernels::Kernels*(int rank)> table_of_;
  std::vector<Socket> listeners_;
  std::vector<std::string> addresses_;
  std::mutex mutex_;
  std::condition_variable changed_;
  const Step* step_ = nullptr;  // null: stop
  int round_ = 0;
  int num_done_ = 0;
  std::vector<Result<RankOutput>> outputs_;
  std::vector<std::thread> threads_;
};

}  // namespace tessera::test
