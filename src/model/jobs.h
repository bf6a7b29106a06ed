// Independent pieces of file work shared by threads, with one progress and the first error. For loading and
// writing checkpoints; the forward pass has its own loops.
#pragma once

#include <cstdint>
#include <functional>
#include <span>

#include "base/error.h"
#include "base/threads.h"

namespace tessera {

using Progress = std::function<void(uint64_t done, uint64_t total)>;

struct Job {
  uint64_t bytes = 0;                     // for the progress
  std::function<Status(int thread)> run;  // thread in [0, num_threads)
  std::function<void()> prefetch = {};    // may be empty; called, by any thread, some jobs before it runs
};

// Runs all jobs, or until one fails; the error is that of the first failing job in their order, whatever the
// threads. `progress` (may be empty) is called by the calling thread alone, at the end with (total, total).
Status RunJobs(std::span<Job> jobs, ThreadPool& threads, const Progress& progress);

}  // namespace tessera
