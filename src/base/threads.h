// A pool for loops over independent tasks, and how many cores there are.
#pragma once

#include <atomic>
#include <cstdint>
#include <span>
#include <thread>
#include <vector>

namespace tessera {

// Cores of the calling thread's affinity mask, ascending.
std::vector<int> AllowedCores();
// How many cores this process may use: those, capped by the cgroup's CPU quota (rounded up). At least 1.
int AvailableCores();
// The calling thread, and threads it starts from now on, run on these cores only. A refusal changes nothing.
void PinThread(std::span<const int> cores);

// Flush-to-zero and denormals-are-zero for the calling thread (numerics.md, rule 1). Every thread that
// computes.
void SetFlushToZero();

// `num_threads` - 1 workers plus the calling thread. One owner thread calls ParallelFor and Use; ParallelFor
// sets flush-to-zero on that thread too. Idle workers spin briefly, then sleep on a futex.
//
// `own_cores`: there is a core for every thread, so waits spin for up to two milliseconds, longer than the
// pause between two steps. `cores` (empty, or at least num_threads of them): worker i stays on cores[i],
// cores[0] is left to the owner; memory that such a worker touches first lies on the NUMA node of its core.
class ThreadPool {
 public:
  explicit ThreadPool(int num_threads, bool own_cores = false, std::span<const int> cores = {});
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }
  // How many of them take part in the loops to come, from 1 to num_threads; the others sleep. At first: all.
  void Use(int num_active);
  int num_active() const { return num_active_.load(std::memory_order_relaxed); }

  // Calls body(task, thread) for task = 0 .. num_tasks - 1, each once, in any order, thread in [0,
  // num_threads). Returns when all are done. `body` must not call ParallelFor. Each thread begins with its
  // own run of consecutive tasks, the same for equal counts, and then helps the others.
  template <typename Body>
  void ParallelFor(int num_tasks, const Body& body) {
    Run(
        num_tasks,
        [](const void* context, int task, int thread) { (*static_cast<const Body*>(context))(task, thread); },
        &body);
  }

 private:
  using Function = void (*)(const void* context, int task, int thread);
  // Tasks that nobody has taken: first of them | end << 32.
  struct alignas(64) Share {
    static uint64_t Next(uint64_t word) { return word & UINT32_MAX; }
    static uint64_t End(uint64_t word) { return word >> 32; }
    int TakeFirst();  // -1: none left
    int TakeLast();
    std::atomic<uint64_t> left{0};
  };
  void Run(int num_tasks, Function function, const void* context);
  void Work(int thread, int core);
  void TakeTasks(int thread);

  const bool own_cores_;
  std::vector<std::thread> workers_;
  std::vector<Share> shares_;
  // What a worker reads at the start of a round lies in one cache line. The function is written by the owner
  // before the shares, and read by those who have taken a task.
  alignas(64) std::atomic<uint32_t> round_{0};
  std::atomic<int> num_active_;
  std::atomic<bool> stop_{false};
  Function function_ = nullptr;
  const void* context_ = nullptr;
  alignas(64) std::atomic<int> num_left_{0};  // tasks of this round that are not done
  std::atomic<bool> owner_sleeps_{false};
  alignas(64) std::atomic<int> num_sleepers_{0};
};

}  // namespace tessera
