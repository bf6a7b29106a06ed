// A pool for loops over independent tasks, and how many cores there are.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace tessera {

// Cores this process may use: its affinity mask, capped by the cgroup's CPU quota (rounded up). At least 1.
int AvailableCores();

// Flush-to-zero and denormals-are-zero for the calling thread (numerics.md, rule 1). Every thread that
// computes.
void SetFlushToZero();

// `num_threads` - 1 workers plus the calling thread. One owner thread calls ParallelFor; it sets
// flush-to-zero on that thread too. Workers spin briefly between loops, then sleep on a futex.
class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(task, thread) for task = 0 .. num_tasks - 1, each once, in any order, thread in [0,
  // num_threads). Returns when all are done. `body` must not call ParallelFor.
  template <typename Body>
  void ParallelFor(int num_tasks, const Body& body) {
    Run(
        num_tasks,
        [](const void* context, int task, int thread) { (*static_cast<const Body*>(context))(task, thread); },
        &body);
  }

 private:
  using Function = void (*)(const void* context, int task, int thread);
  void Run(int num_tasks, Function function, const void* context);
  void Work(int thread);
  void TakeTasks(int thread);

  std::vector<std::thread> workers_;
  Function function_ = nullptr;  // written by the owner before round_ moves
  const void* context_ = nullptr;
  int num_tasks_ = 0;
  bool stop_ = false;
  alignas(64) std::atomic<int> next_task_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
  alignas(64) std::atomic<int> busy_{0};
  std::atomic<int> sleepers_{0};
};

}  // namespace tessera
