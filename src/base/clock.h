// Monotonic time behind one seam, so that schedulers and tests can run on a virtual clock.
#pragma once

#include <chrono>
#include <cstdint>

namespace tessera {

// Nanoseconds of a monotonic clock; only differences mean something.
using TimeNs = int64_t;

class Clock {
 public:
  virtual ~Clock() = default;
  virtual TimeNs Now() const = 0;  // any thread
};

class SteadyClock : public Clock {
 public:
  TimeNs Now() const override {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }
};

// Moves only when told. Owned by one thread.
class VirtualClock : public Clock {
 public:
  TimeNs Now() const override { return now_; }
  void Advance(TimeNs by) { now_ += by; }

 private:
  TimeNs now_ = 0;
};

inline double Seconds(TimeNs ns) {
  return static_cast<double>(ns) * 1e-9;
}

}  // namespace tessera
