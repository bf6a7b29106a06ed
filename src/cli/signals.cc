// One thread waits for the blocked signals; SIGUSR2, sent by the destructor to it alone, ends it.
#include "cli/signals.h"

#include <unistd.h>
#include <csignal>
#include <cstdio>

#include "base/format.h"

namespace tessera::cli {
namespace {

sigset_t WatchedSet() {
  sigset_t set;
  sigemptyset(&set);
  for (const int number : {SIGTERM, SIGINT, SIGUSR2}) sigaddset(&set, number);
  return set;
}

}  // namespace

SignalWatch::SignalWatch() {
  const sigset_t set = WatchedSet();
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  thread_ = std::thread([this] { Watch(); });
}

SignalWatch::~SignalWatch() {
  pthread_kill(thread_.native_handle(), SIGUSR2);
  thread_.join();
}

void SignalWatch::Watch() {
  const sigset_t set = WatchedSet();
  for (;;) {
    int number = 0;
    sigwait(&set, &number);
    if (number == SIGUSR2) return;
    {
      std::lock_guard lock(mutex_);
      ++num_signals_;
      if (!armed_ || num_signals_ > 1) {
        fmt::print(stderr, "{}: ending at once\n", number == SIGINT ? "SIGINT" : "SIGTERM");
        std::fflush(nullptr);
        _exit(128 + number);
      }
    }
    ready_.notify_all();
  }
}

bool SignalWatch::Wait(std::chrono::milliseconds limit) {
  std::unique_lock lock(mutex_);
  return ready_.wait_for(lock, limit, [this] { return num_signals_ > 0; });
}

}  // namespace tessera::cli
