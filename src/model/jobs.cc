// See jobs.h. Jobs are taken in ascending order, so that files are read from front to back, and so that all
// jobs before a failing one have been started.
#include "model/jobs.h"

#include <atomic>
#include <mutex>
#include <optional>
#include <utility>

namespace tessera {
namespace {

constexpr int kPrefetched = 6;  // jobs beyond those that all threads are at, whose data is asked for

}  // namespace

Status RunJobs(std::span<Job> jobs, ThreadPool& threads, const Progress& progress) {
  uint64_t total = 0;
  for (const Job& job : jobs) total += job.bytes;
  const int num_jobs = static_cast<int>(jobs.size());
  std::atomic<uint64_t> done{0};
  std::atomic<int> first_failed{num_jobs};
  std::mutex mutex;  // guards error
  std::optional<Error> error;
  std::atomic<int> next{0};
  threads.ParallelFor(threads.num_threads(), [&](int, int thread) {
    for (int index = next++; index < first_failed.load(); index = next++) {
      const Job& job = jobs[static_cast<size_t>(index)];
      if (const int later = index + threads.num_threads() + kPrefetched; later < num_jobs) {
        if (const auto& prefetch = jobs[static_cast<size_t>(later)].prefetch) prefetch();
      }
      if (Status status = job.run(thread); !status) {
        const std::lock_guard lock(mutex);
        if (index < first_failed.load()) {
          first_failed = index;
          error = std::move(status).error();
        }
        break;
      }
      const uint64_t now = done += job.bytes;
      if (thread == 0 && progress) progress(now, total);
    }
  });
  if (error) return std::unexpected(*std::move(error));
  if (progress) progress(total, total);
  return {};
}

}  // namespace tessera
