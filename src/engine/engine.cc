// The thin shell around the scheduler: one thread, one mutex, and the mail between them. What is under the
// mutex (Mail) belongs to everybody; what is not belongs to the engine thread.
#include "engine/engine.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/log.h"
#include "base/threads.h"
#include "engine/scheduler.h"

namespace tessera {
namespace {

struct Submission {
  uint64_t key = 0;
  std::shared_ptr<const Request> request;
};

struct Cancellation {
  uint64_t key = 0;
  int choice = -1;  // -1: all
};

// A request that still owes events.
struct OpenRequest {
  std::string id;
  std::shared_ptr<Outbox> outbox;
  std::vector<bool> open;  // by choice
  int num_open = 0;
};

}  // namespace

struct Engine::Content {
  Content(const EngineOptions& options, Executor& executor, const Clock& clock)
      : options(options), executor(executor), clock(clock), scheduler(options) {}

  const EngineOptions options;
  Executor& executor;
  const Clock& clock;

  std::mutex mutex;
  std::condition_variable mail_came;  // for the engine thread
  std::condition_variable all_done;   // for Drain
  // -- Under the mutex.
  std::vector<Submission> submissions;
  std::vector<Cancellation> cancellations;
  bool stop = false;   // abort everything and leave
  bool abort = false;  // abort everything
  bool draining = false;
  bool failed = false;
  Error fatal;
  std::optional<Error> broken;  // news for the engine thread
  uint64_t last_key = 0;
  std::unordered_map<std::string, uint64_t> keys;  // id -> key of an open request
  std::unordered_map<uint64_t, OpenRequest> open;
  EngineStats stats;          // of the scheduler, after the last step
  int64_t num_submitted = 0;  // sequences in `submissions`

  // -- The engine thread's.
  Scheduler scheduler;
  std::vector<SequenceEvent> events;
  TimeNs last_step_end = 0;
  TimeNs run_time = 0;
  std::thread thread;

  void Loop();
  bool TakeMail();
  void RunStep();
  void Deliver();
  void Publish();
  void Fail(Error error);
  void Close(std::unordered_map<uint64_t, OpenRequest>::iterator place);
};

void Engine::Content::Loop() {
  SetFlushToZero();
  while (TakeMail()) {
    if (!scheduler.idle()) RunStep();
  }
}

// Waits until there is something to do and applies what others asked for. False: leave.
bool Engine::Content::TakeMail() {
  std::vector<Submission> new_submissions;
  std::vector<Cancellation> new_cancellations;
  bool abort_all = false;
  bool leave = false;
  Error why;
  std::optional<Error> news;
  {
    std::unique_lock lock(mutex);
    mail_came.wait(lock, [this] {
      return stop || abort || (broken && !failed) || !submissions.empty() || !cancellations.empty() ||
             !scheduler.idle();
    });
    std::swap(new_submissions, submissions);
    std::swap(new_cancellations, cancellations);
    stats.num_waiting += std::exchange(num_submitted, 0);
    leave = stop;
    abort_all = std::exchange(abort, false) || stop;
    why = failed ? fatal : Error{ErrorKind::kUnavailable, "the engine shuts down"};
    if (broken && !failed) news = *broken;
  }
  for (Submission& submission : new_submissions) scheduler.Add(submission.key, std::move(submission.request));
  for (const Cancellation& cancellation : new_cancellations) {
    if (cancellation.choice < 0) {
      scheduler.Cancel(cancellation.key);
    } else {
      scheduler.CancelChoice(cancellation.key, cancellation.choice);
    }
  }
  if (news) Fail(*news);
  if (abort_all) {
    scheduler.EndAll(FinishReason::kAbort, why, clock.Now(), events);
    Deliver();
  } else if (!new_cancellations.empty()) {
    Publish();
  }
  return !leave;
}

void Engine::Content::RunStep() {
  const Step& step = scheduler.Plan(clock.Now());
  StepOutput output;
  if (std::ranges::any_of(step.groups, [](const GroupStep& group) { return !group.tokens.empty(); })) {
    Publish();  // a step may last seconds: who runs in it waits no more
    const TimeNs begin = clock.Now();
    Result<StepOutput> result = executor.Run(step);
    run_time += clock.Now() - begin;
    if (!result) return Fail(std::move(result.error()));
    if (Status status = scheduler.CheckOutput(*result); !status) return Fail(std::move(status.error()));
    output = std::move(*result);
  }
  const TimeNs now = clock.Now();
  scheduler.Commit(std::move(output), now, events);
  last_step_end = now;
  Deliver();
}

// Puts the events of a step into their outboxes, except those of requests that were cancelled meanwhile. The
// mutex is held, so that no event follows a Cancel that has returned.
void Engine::Content::Deliver() {
  std::lock_guard lock(mutex);
  for (SequenceEvent& event : events) {
    const auto place = open.find(event.key);
    if (place == open.end() || !place->second.open[event.event.choice]) continue;
    OpenRequest& request = place->second;
    const bool is_last = event.event.finish != FinishReason::kNone;
    if (is_last) {
      request.open[event.event.choice] = false;
      --request.num_open;
    }
    // Whoever reads the last event may submit the same id again at once, or destroy what notify refers to.
    const std::shared_ptr<Outbox> outbox = request.outbox;
    if (request.num_open == 0) Close(place);
    outbox->Put(std::move(event.event));
  }
  events.clear();
  stats = scheduler.stats();
  stats.last_step_end = last_step_end;
  stats.run_time = run_time;
  if (open.empty()) all_done.notify_all();
}

void Engine::Content::Publish() {
  std::lock_guard lock(mutex);
  stats = scheduler.stats();
  stats.last_step_end = last_step_end;
  stats.run_time = run_time;
}

// The world is broken for good: everybody learns why, and nobody may come in.
void Engine::Content::Fail(Error error) {
  LogError("the engine stops: {}", error.message);
  scheduler.EndAll(FinishReason::kError, error, clock.Now(), events);
  {
    std::lock_guard lock(mutex);
    failed = true;
    fatal = error;
    for (const Submission& submission : std::exchange(submissions, {})) {
      const int num_choices = submission.request->num_choices;
      for (int choice = 0; choice < num_choices; ++choice) {
        TokenEvent event;
        event.choice = choice;
        event.finish = FinishReason::kError;
        event.error = error;
        events.push_back({submission.key, std::move(event)});
      }
    }
    num_submitted = 0;
  }
  Deliver();
}

void Engine::Content::Close(std::unordered_map<uint64_t, OpenRequest>::iterator place) {
  keys.erase(place->second.id);
  open.erase(place);
}

Engine::Engine(const EngineOptions& options, Executor& executor, const Clock& clock)
    : content_(std::make_unique<Content>(options, executor, clock)) {
  content_->stats = content_->scheduler.stats();
  content_->thread = std::thread([content = content_.get()] { content->Loop(); });
}

Engine::~Engine() {
  {
    std::lock_guard lock(content_->mutex);
    content_->stop = true;
    content_->draining = true;
  }
  content_->mail_came.notify_all();
  content_->thread.join();
}

Status Engine::Submit(std::shared_ptr<const Request> request, std::shared_ptr<Outbox> outbox) {
  Content& content = *content_;
  RETURN_IF_ERROR(CheckRequest(content.options, *request));
  {
    std::lock_guard lock(content.mutex);
    if (content.failed) return std::unexpected(Error{ErrorKind::kUnavailable, content.fatal.message});
    if (content.draining) {
      return Fail(ErrorKind::kUnavailable, "the engine shuts down and takes no new requests");
    }
    const int64_t num_waiting = content.stats.num_waiting + content.num_submitted;
    if (num_waiting >= content.options.max_queued_requests) {
      return Fail(ErrorKind::kExhausted, "{} requests are waiting, at most {} may", num_waiting,
                  content.options.max_queued_requests);
    }
    const uint64_t key = content.last_key + 1;
    if (!content.keys.try_emplace(request->id, key).second) {
      return Invalid("request id {} is in use by a request that is not finished", request->id);
    }
    content.last_key = key;
    const int num_choices = request->num_choices;
    content.open.emplace(key, OpenRequest{.id = request->id,
                                          .outbox = std::move(outbox),
                                          .open = std::vector<bool>(num_choices, true),
                                          .num_open = num_choices});
    content.num_submitted += num_choices;
    content.submissions.push_back({key, std::move(request)});
  }
  content.mail_came.notify_one();
  return {};
}

void Engine::Cancel(const std::string& request_id) {
  Content& content = *content_;
  {
    std::lock_guard lock(content.mutex);
    const auto key = content.keys.find(request_id);
    if (key == content.keys.end()) return;
    content.cancellations.push_back({.key = key->second});
    content.Close(content.open.find(key->second));
    if (content.open.empty()) content.all_done.notify_all();
  }
  content.mail_came.notify_one();
}

void Engine::CancelChoice(const std::string& request_id, int choice) {
  Content& content = *content_;
  {
    std::lock_guard lock(content.mutex);
    const auto key = content.keys.find(request_id);
    if (key == content.keys.end()) return;
    const auto place = content.open.find(key->second);
    OpenRequest& request = place->second;
    if (choice < 0 || choice >= static_cast<int>(request.open.size()) || !request.open[choice]) return;
    content.cancellations.push_back({.key = key->second, .choice = choice});
    request.open[choice] = false;
    if (--request.num_open == 0) content.Close(place);
    if (content.open.empty()) content.all_done.notify_all();
  }
  content.mail_came.notify_one();
}

EngineStats Engine::Stats() const {
  std::lock_guard lock(content_->mutex);
  EngineStats stats = content_->stats;
  stats.num_waiting += content_->num_submitted;
  return stats;
}

std::vector<RankStatus> Engine::Ranks() const {
  return content_->executor.Ranks();
}

void Engine::Break(Error error) {
  {
    std::lock_guard lock(content_->mutex);
    if (!content_->broken) content_->broken = std::move(error);
  }
  content_->mail_came.notify_one();
}

bool Engine::healthy() const {
  std::lock_guard lock(content_->mutex);
  return !content_->failed;
}

Error Engine::fatal_error() const {
  std::lock_guard lock(content_->mutex);
  return content_->fatal;
}

void Engine::Drain(std::chrono::nanoseconds limit) {
  Content& content = *content_;
  std::unique_lock lock(content.mutex);
  content.draining = true;
  const auto is_done = [&content] { return content.open.empty(); };
  if (content.all_done.wait_for(lock, limit, is_done)) return;
  content.abort = true;
  content.mail_came.notify_one();
  // At most the rest of the running step: every wait inside the executor has a deadline of its own.
  content.all_done.wait(lock, is_done);
}

}  // namespace tessera
