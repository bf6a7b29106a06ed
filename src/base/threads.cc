// The pool. A loop is cut into as many shares as threads take part. A share is one word, {next, end}: threads
// of the share take its first task, those that have run out take the last task of another share. Tasks are
// counted, not threads: a worker that wakes late finds nothing to do and delays nobody.
#include "base/threads.h"

#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <string>

#include "base/check.h"
#include "base/clock.h"

namespace tessera {
namespace {

// About 20 us on a 3 GHz core: longer than the pause between two loops of one forward pass.
constexpr int kPauses = 600;
// With cores for itself, a thread then looks again for this long, so that it is awake when the next step
// comes, and lets whoever else is runnable go first.
constexpr TimeNs kAwakeNs = 2'000'000;
constexpr int kPausesPerYield = 60;
constexpr size_t kMaxShares = 16;

// True as soon as `done` is; false when it pays no longer to look.
template <typename Done>
bool Spin(bool own_cores, const Done& done) {
  for (int i = 0; i < kPauses; ++i) {
    if (done()) return true;
    _mm_pause();
  }
  if (!own_cores) return false;
  const SteadyClock clock;
  for (const TimeNs end = clock.Now() + kAwakeNs; clock.Now() < end;) {
    for (int i = 0; i < kPausesPerYield; ++i) {
      if (done()) return true;
      _mm_pause();
    }
    sched_yield();
  }
  return false;
}

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

std::vector<int> AllowedCores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cores;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return cores;
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (CPU_ISSET(core, &set)) cores.push_back(core);
  }
  return cores;
}

int AvailableCores() {
  const std::vector<int> allowed = AllowedCores();
  int cores = static_cast<int>(allowed.empty() ? std::thread::hardware_concurrency() : allowed.size());
  const double quota = CgroupCpus();
  if (quota > 0) cores = std::min(cores, static_cast<int>(std::ceil(quota)));
  return std::max(cores, 1);
}

void PinThread(std::span<const int> cores) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int core : cores) {
    if (core >= 0 && core < CPU_SETSIZE) CPU_SET(core, &set);
  }
  sched_setaffinity(0, sizeof set, &set);
}

void SetFlushToZero() {
  _mm_setcsr(_mm_getcsr() | 0x8040);
}

ThreadPool::ThreadPool(int num_threads, bool own_cores, std::span<const int> cores)
    : own_cores_(own_cores),
      shares_(std::min(static_cast<size_t>(num_threads), kMaxShares)),
      num_active_(num_threads) {
  CHECK_GE(num_threads, 1);
  CHECK(cores.empty() || cores.size() >= static_cast<size_t>(num_threads));
  for (int thread = 1; thread < num_threads; ++thread) {
    const int core = cores.empty() ? -1 : cores[static_cast<size_t>(thread)];
    workers_.emplace_back([this, thread, core] { Work(thread, core); });
  }
}

ThreadPool::~ThreadPool() {
  stop_ = true;
  Use(num_threads());
  round_.fetch_add(1);
  round_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::Use(int num_active) {
  num_active = std::clamp(num_active, 1, num_threads());
  if (num_active_.exchange(num_active) < num_active) num_active_.notify_all();
}

int ThreadPool::Share::TakeFirst() {
  if (const uint64_t seen = left.load(std::memory_order_relaxed); Next(seen) >= End(seen)) return -1;
  const uint64_t before = left.fetch_add(1, std::memory_order_acquire);
  return Next(before) < End(before) ? static_cast<int>(Next(before)) : -1;
}

int ThreadPool::Share::TakeLast() {
  uint64_t seen = left.load(std::memory_order_relaxed);
  while (Next(seen) < End(seen)) {
    if (left.compare_exchange_weak(seen, seen - (uint64_t{1} << 32), std::memory_order_acquire))
      return static_cast<int>(End(seen)) - 1;
  }
  return -1;
}

// A task that has been taken keeps its loop from ending: what the loop is made of is read after that.
void ThreadPool::TakeTasks(int thread) {
  const size_t own = static_cast<size_t>(thread) % shares_.size();
  int num_done = 0;
  for (int task = shares_[own].TakeFirst(); task >= 0; task = shares_[own].TakeFirst(), ++num_done)
    function_(context_, task, thread);
  for (size_t i = 1; i < shares_.size(); ++i) {
    Share& other = shares_[(own + i) % shares_.size()];
    for (int task = other.TakeLast(); task >= 0; task = other.TakeLast(), ++num_done)
      function_(context_, task, thread);
  }
  if (num_done > 0 && num_left_.fetch_sub(num_done) == num_done && owner_sleeps_) num_left_.notify_one();
}

void ThreadPool::Run(int num_tasks, Function function, const void* context) {
  SetFlushToZero();
  const int active = num_active();
  if (active == 1 || num_tasks <= 1) {
    for (int task = 0; task < num_tasks; ++task) function(context, task, 0);
    return;
  }
  function_ = function;
  context_ = context;
  num_left_.store(num_tasks, std::memory_order_relaxed);
  const auto num_shares = std::min(static_cast<uint64_t>(active), uint64_t{shares_.size()});
  for (uint64_t i = 0, begin = 0; i < num_shares; ++i) {
    const uint64_t end = (i + 1) * static_cast<uint64_t>(num_tasks) / num_shares;
    shares_[i].left.store(end << 32 | begin, std::memory_order_release);
    begin = end;
  }
  round_.fetch_add(1);
  if (num_sleepers_.load() > 0) round_.notify_all();
  TakeTasks(0);
  const auto done = [this] { return num_left_.load(std::memory_order_acquire) == 0; };
  if (Spin(own_cores_, done)) return;
  owner_sleeps_ = true;
  for (int left = num_left_.load(); left != 0; left = num_left_.load()) num_left_.wait(left);
  owner_sleeps_ = false;
}

void ThreadPool::Work(int thread, int core) {
  if (core >= 0) PinThread({&core, 1});
  SetFlushToZero();
  for (uint32_t seen = 0; !stop_;) {
    if (const int active = num_active_.load(); thread >= active) {
      num_active_.wait(active);
      continue;
    }
    if (!Spin(own_cores_, [&] { return round_.load(std::memory_order_acquire) != seen; })) {
      num_sleepers_.fetch_add(1);
      round_.wait(seen);
      num_sleepers_.fetch_sub(1);
    }
    seen = round_.load(std::memory_order_acquire);
    if (thread < num_active()) TakeTasks(thread);
  }
}

}  // namespace tessera
