// Outbox: the only place where the engine thread and the front end meet on the way out. Nothing here decides
// anything.
#include "engine/request.h"

#include <utility>

namespace tessera {

void Outbox::Put(TokenEvent event) {
  bool was_empty = false;
  {
    std::lock_guard lock(mutex_);
    was_empty = events_.empty();
    events_.push_back(std::move(event));
  }
  if (was_empty && notify_) notify_();
}

std::vector<TokenEvent> Outbox::Take() {
  std::lock_guard lock(mutex_);
  return std::exchange(events_, {});
}

}  // namespace tessera
