// SIGTERM and SIGINT as values. Nothing of them reaches another thread.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace tessera::cli {

// Made first thing in main, before other threads. Until Arm(), a signal ends the process at once (loading can
// take minutes). Afterwards the first one is reported by Wait, a second one ends the process at once.
class SignalWatch {
 public:
  SignalWatch();
  ~SignalWatch();

  void Arm() { armed_ = true; }
  // True when the first signal has come, at once or within `limit`.
  bool Wait(std::chrono::milliseconds limit);

 private:
  void Watch();

  std::atomic<bool> armed_{false};
  std::mutex mutex_;
  std::condition_variable ready_;
  int num_signals_ = 0;  // under mutex_
  std::thread thread_;
};

}  // namespace tessera::cli
