// One thread per rank; a step is a round that all of them take.
#include "support/rank_threads.h"

#include <unistd.h>

#include <algorithm>
#include <map>

#include "comm/shared_memory.h"
#include "comm/tcp_mesh.h"
#include "model/weights.h"
#include "support/or_die.h"

namespace tessera::test {

std::string LayoutText(const Layout& layout) {
  return Format("{}{} over nodes [{}]", DegreesText(layout.degrees),
                layout.split_embedding ? ", split embedding," : "", fmt::join(layout.node_of_rank, " "));
}

int MaxRanks() {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  return 4;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
  return 4;
#else
  return 16;
#endif
#else
  return 16;
#endif
}

RankThreads::RankThreads(const Checkpoint& checkpoint, const ModelConfig& config, const Layout& layout,
                         const RankOptions& options, int threads_per_rank,
                         std::function<const kernels::Kernels*(int rank)> table_of)
    : checkpoint_(checkpoint),
      config_(config),
      layout_([&] {
        Layout full = layout;
        full.node_of_rank.resize(static_cast<size_t>(layout.degrees.world()));
        return full;
      }()),
      options_(options),
      threads_per_rank_(threads_per_rank),
      table_of_(std::move(table_of)) {
  const int world = layout_.degrees.world();
  OrDie(
      CheckDegrees(layout_.degrees, {.num_heads = config.num_heads, .num_experts = config.n_routed_experts}));
  std::map<int, int> num_local;
  for (const int node : layout_.node_of_rank) ++num_local[node];
  std::map<int, int> memory;
  for (const auto& [node, count] : num_local) memory[node] = OrDie(SharedMemory::Create(count));
  for (int rank = 0; rank < world; ++rank) {
    listeners_.push_back(OrDie(Listen({"127.0.0.1", 0})));
    addresses_.push_back(OrDie(LocalEndpoint(listeners_.back())).Text());
  }
  outputs_.resize(static_cast<size_t>(world));
  num_done_ = -world;  // the first round is the making of the ranks
  std::map<int, int> next_local;
  for (int rank = 0; rank < world; ++rank) {
    const int node = layout_.node_of_rank[rank];
    threads_.emplace_back(&RankThreads::RunRank, this, rank, memory[node], next_local[node]++);
  }
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return num_done_ == 0; });
  for (const auto& [node, descriptor] : memory) close(descriptor);
}

RankThreads::~RankThreads() {
  {
    const std::lock_guard lock(mutex_);
    step_ = nullptr;
    ++round_;
    changed_.notify_all();
  }
  for (std::thread& thread : threads_) thread.join();
}

void RankThreads::RunRank(int rank, int memory_descriptor, int local_rank) {
  const bool several_nodes = std::ranges::count(layout_.node_of_rank, layout_.node_of_rank[0]) <
                             static_cast<int64_t>(layout_.node_of_rank.size());
  std::unique_ptr<SharedMemory> memory = OrDie(SharedMemory::Attach(memory_descriptor, local_rank, false));
  std::unique_ptr<TcpMesh> mesh;
  if (several_nodes) {
    const MeshOptions options{.rank = rank,
                              .node_of_rank = layout_.node_of_rank,
                              .addresses = addresses_,
                              .secret = "test",
                              .epoch = 7};
    mesh = OrDie(TcpMesh::Connect(listeners_[rank], options, After(std::chrono::minutes(1))));
  }
  const auto world = OrDie(Communicator::Create({.rank = rank,
                                                 .node_of_rank = layout_.node_of_rank,
                                                 .memory = memory.get(),
                                                 .mesh = mesh.get(),
                                                 .deadline = std::chrono::minutes(1)}));
  const Topology topology(layout_.degrees, rank);
  const auto group = OrDie(world->Split(topology.dp_rank(), topology.tp_rank()));
  ThreadPool pool(threads_per_rank_);
  const RankShare share = ShareOfRank(config_, topology, layout_.split_embedding);
  const Weights weights = OrDie(Weights::Load(checkpoint_, config_, share, pool, {}));
  const auto hands =
      OrDie(Rank::Create(config_, weights, {topology, *world, *group}, options_, *table_of_(rank), pool));
  for (int round = 0;; ++round) {
    const Step* step = nullptr;
    {
      std::unique_lock lock(mutex_);
      ++num_done_;
      changed_.notify_all();
      changed_.wait(lock, [&] { return round_ > round; });
      step = step_;
    }
    if (step == nullptr) return;
    outputs_[rank] = hands->Run(*step);
  }
}

Result<StepOutput> RankThreads::Run(const Step& step) {
  {
    std::unique_lock lock(mutex_);
    step_ = &step;
    num_done_ = 0;
    ++round_;
    changed_.notify_all();
    changed_.wait(lock, [&] { return num_done_ == static_cast<int>(threads_.size()); });
  }
  std::vector<RankOutput> outputs;
  for (Result<RankOutput>& output : outputs_) {
    if (!output) return std::unexpected(output.error());
    outputs.push_back(std::move(*output));
  }
  return MergeOutputs(step, layout_.degrees, outputs);
}

}  // namespace tessera::test
