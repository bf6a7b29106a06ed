// The pool: workers take tasks from one counter; spinning is brief, because ranks may share cores.
#include "base/threads.h"

#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <string>

#include "base/check.h"

namespace tessera {
namespace {

// About 20 us on a 3 GHz core: longer than the pause between two loops of one forward pass.
constexpr int kSpins = 600;

// Quota / period of the tightest cgroup, 0 for none.
double CgroupCpus() {
  double fewest = 0;
  const auto consider = [&](double quota, double period) {
    if (quota > 0 && period > 0 && (fewest == 0 || quota / period < fewest)) fewest = quota / period;
  };
  std::ifstream membership("/proc/self/cgroup");
  for (std::string line; std::getline(membership, line);) {
    const size_t colon = line.rfind(':');
    const bool v2 = line.starts_with("0::");
    if (colon == std::string::npos || (!v2 && line.find(":cpu") == std::string::npos)) continue;
    for (std::string path = line.substr(colon + 1);; path = path.substr(0, path.rfind('/'))) {
      const std::string folder = (v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu") + (path == "/" ? "" : path);
      double quota = 0;
      double period = 0;
      if (v2) {
        std::ifstream(folder + "/cpu.max") >> quota >> period;
      } else {
        std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;
        std::ifstream(folder + "/cpu.cfs_period_us") >> period;
      }
      consider(quota, period);
      if (path.empty() || path == "/") break;
    }
  }
  return fewest;
}

}  // namespace

int AvailableCores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  int cores = sched_getaffinity(0, sizeof set, &set) == 0
                  ? CPU_COUNT(&set)
                  : static_cast<int>(std::thread::hardware_concurrency());
  const double quota = CgroupCpus();
  if (quota > 0) cores = std::min(cores, static_cast<int>(std::ceil(quota)));
  return std::max(cores, 1);
}

void SetFlushToZero() {
  _mm_setcsr(_mm_getcsr() | 0x8040);
}

ThreadPool::ThreadPool(int num_threads) {
  CHECK_GE(num_threads, 1);
  for (int thread = 1; thread < num_threads; ++thread) {
    workers_.emplace_back([this, thread] { Work(thread); });
  }
}

ThreadPool::~ThreadPool() {
  stop_ = true;
  round_.fetch_add(1);
  round_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::TakeTasks(int thread) {
  for (int task = next_task_.fetch_add(1, std::memory_order_relaxed); task < num_tasks_;
       task = next_task_.fetch_add(1, std::memory_order_relaxed)) {
    function_(context_, task, thread);
  }
}

void ThreadPool::Run(int num_tasks, Function function, const void* context) {
  SetFlushToZero();
  if (workers_.empty() || num_tasks <= 1) {
    for (int task = 0; task < num_tasks; ++task) function(context, task, 0);
    return;
  }
  function_ = function;
  context_ = context;
  num_tasks_ = num_tasks;
  next_task_.store(0, std::memory_order_relaxed);
  busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  round_.fetch_add(1);
  if (sleepers_.load() > 0) round_.notify_all();
  TakeTasks(0);
  for (int spin = 0; busy_.load(std::memory_order_acquire) != 0; ++spin) {
    if (spin < kSpins) {
      _mm_pause();
    } else if (const int left = busy_.load(); left != 0) {
      busy_.wait(left);
    }
  }
}

void ThreadPool::Work(int thread) {
  SetFlushToZero();
  uint32_t seen = 0;
  while (true) {
    int spin = 0;
    while (round_.load() == seen) {
      if (++spin < kSpins) {
        _mm_pause();
        continue;
      }
      sleepers_.fetch_add(1);
      round_.wait(seen);
      sleepers_.fetch_sub(1);
    }
    ++seen;  // the owner starts a round only after every worker finished the last one
    if (stop_) return;
    TakeTasks(thread);
    if (busy_.fetch_sub(1) == 1) busy_.notify_one();
  }
}

}  // namespace tessera
