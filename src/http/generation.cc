// See generation.h.
#include "http/generation.h"

#include <sys/random.h>

#include <algorithm>
#include <ctime>

#include "base/check.h"
#include "base/log.h"

namespace tessera {

void NewsList::Add(std::weak_ptr<Generation> generation) {
  std::lock_guard lock(mutex_);
  if (!server_) return;
  waiting_.push_back(std::move(generation));
  if (waiting_.size() == 1) server_->Post([self = self_.lock()] { Deliver(self); });
}

void NewsList::Deliver(const std::shared_ptr<NewsList>& list) {
  std::vector<std::weak_ptr<Generation>> ready;
  {
    std::lock_guard lock(list->mutex_);
    ready.swap(list->waiting_);
  }
  for (const auto& entry : ready) {
    if (const auto generation = entry.lock()) generation->Pump();
  }
}

void NewsList::Close() {
  std::lock_guard lock(mutex_);
  server_ = nullptr;
  waiting_.clear();
}

HttpResponse ErrorResponse(const ApiError& error) {
  HttpResponse response{.status = error.status, .body = ErrorBody(error)};
  if (error.retry_after_s > 0)
    response.headers.emplace_back("Retry-After", std::to_string(error.retry_after_s));
  if (error.status == 401) response.headers.emplace_back("WWW-Authenticate", "Bearer");
  return response;
}

uint64_t RandomSeed() {
  uint64_t seed = 0;
  // Blocks only in the first moments of a machine; 8 bytes are never cut short.
  CHECK_EQ(::getrandom(&seed, sizeof(seed), 0), static_cast<ssize_t>(sizeof(seed)));
  return seed;
}

std::string ChooseRequestId(std::string_view header, std::string_view field) {
  for (const std::string_view id : {header, field}) {
    const bool plain = std::all_of(id.begin(), id.end(), [](char c) { return c > ' ' && c < '\x7F'; });
    if (!id.empty() && id.size() <= 256 && plain) return std::string(id);
  }
  return Format("{:016x}{:016x}", RandomSeed(), RandomSeed());
}

Generation::Generation(Service& service, CallKind kind, std::shared_ptr<Exchange> exchange)
    : service_(service), kind_(kind), exchange_(std::move(exchange)), arrival_(service.model.clock.Now()) {}

Generation::~Generation() = default;

void Generation::Start(Service& service, CallKind kind, HttpRequest http,
                       std::shared_ptr<Exchange> exchange) {
  const std::shared_ptr<Generation> self(new Generation(service, kind, exchange));
  ++service.load;
  exchange->on_closed = [self] { self->OnClosed(); };
  exchange->on_drained = [weak = std::weak_ptr(self)] {
    if (const auto generation = weak.lock()) generation->Pump();
  };
  service.server.RunInBackground([self, http = std::move(http)]() mutable {
    self->Prepare(std::move(http));
    self->service_.server.Post([self] { self->Submit(); });
  });
}

void Generation::Prepare(HttpRequest http) {
  const auto refuse = [this](ApiError error) { refusal_ = std::move(error); };
  id_ = ChooseRequestId(http.Header("x-request-id"), "");
  const bool chosen = http.Header("x-request-id") == id_;
  auto body = ParseBody(http.body);
  if (!body) return refuse(std::move(body.error()));
  std::string().swap(http.body);
  const CallRules rules = service_.call_rules();
  auto call = kind_ == CallKind::kChat ? ParseChatCall(*body, rules) : ParseCompletionCall(*body, rules);
  if (!call) return refuse(std::move(call.error()));
  call_ = std::move(*call);
  if (!chosen) id_ = ChooseRequestId("", call_.request_id);
  seed_ = call_.seed ? *call_.seed : RandomSeed();
  auto prompts = PreparePrompts(call_, seed_, service_.prompt_rules());
  if (!prompts) return refuse(std::move(prompts.error()));
  prompts_ = std::move(*prompts);
}

bool Generation::reasoning_on() const {
  return kind_ == CallKind::kChat && service_.options.reasoning_parser;
}

std::vector<std::pair<std::string, std::string>> Generation::Headers() const {
  if (!service_.options.enable_request_id_headers) return {};
  return {{"X-Request-Id", id_}};
}

void Generation::MakeChoices() {
  const SamplingParams& sampling = request(0).sampling;
  const StopRules stops{.strings = call_.stop,
                        .include_in_output = call_.include_stop,
                        .min_tokens = sampling.min_tokens,
                        .skip_special_tokens = call_.skip_special_tokens};
  const LogprobStyle style{.kind = kind_,
                           .tokens_as_ids = call_.tokens_as_ids,
                           .skip_special_tokens = call_.skip_special_tokens,
                           .num_top = sampling.num_logprobs};
  const size_t count = prompts_.size() * static_cast<size_t>(call_.num_choices);
  choices_.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    Choice& choice = choices_.emplace_back(service_.model.tokenizer, stops, reasoning_on(), style);
    choice.record.arrival = arrival_;
    choice.record.prompt_tokens =
        static_cast<int64_t>(request(static_cast<int>(i) / call_.num_choices).prompt.size());
  }
}

void Generation::Submit() {
  if (over_ || !exchange_->open()) return OnClosed();
  if (refusal_) return Fail(*refusal_);
  if (service_.draining) {
    return Fail({.status = 503,
                 .type = "ServiceUnavailableError",
                 .message = "the server is shutting down",
                 .retry_after_s = 5});
  }
  MakeChoices();
  const ApiOptions& options = service_.options;
  const bool chat = kind_ == CallKind::kChat;
  const UsageStyle usage{.prompt_details = options.enable_prompt_tokens_details,
                         .reasoning_details = reasoning_on()};
  writer_.emplace(kind_, (chat ? "chatcmpl-" : "cmpl-") + id_, static_cast<int64_t>(std::time(nullptr)),
                  options.model_names.empty() ? std::string() : options.model_names.front(),
                  Format("tessera-{}-{}", options.version, options.numerics), options.response_role,
                  reasoning_on(), usage);
  // What a client chose may be in use twice; what the engine sees may not.
  const uint64_t number = ++service_.num_requests;
  int64_t num_tokens = 0;
  for (size_t i = 0; i < prompts_.size(); ++i) {
    prompts_[i].request->id = Format("{}-{}-{}", writer_->id(), number, i);
    num_tokens += static_cast<int64_t>(prompts_[i].request->prompt.size());
    outboxes_.push_back(
        std::make_shared<Outbox>([news = service_.news, weak = weak_from_this()] { news->Add(weak); }));
    if (auto status = service_.model.engine.Submit(prompts_[i].request, outboxes_.back()); !status) {
      outboxes_.pop_back();
      if (status.error().kind == ErrorKind::kExhausted) service_.metrics.OnRejected();
      return Fail(FromError(status.error()));
    }
    service_.metrics.OnRequest(call_.num_choices, request(static_cast<int>(i)).sampling.max_tokens);
  }
  LogInfo("request {}: {} prompts of {} tokens in all, n {}, max_tokens {}, seed {}{}", writer_->id(),
          prompts_.size(), num_tokens, call_.num_choices, request(0).sampling.max_tokens,
          static_cast<int64_t>(seed_), call_.seed ? "" : " (drawn)");
}

void Generation::CancelAll() {
  for (size_t i = 0; i < outboxes_.size(); ++i) service_.model.engine.Cancel(request(static_cast<int>(i)).id);
  outboxes_.clear();
  for (Choice& choice : choices_) {
    if (choice.finished || !choice.started) continue;
    choice.record.finish = "abort";
    service_.metrics.OnSequenceEnd(choice.record);
  }
}

void Generation::OnClosed() {
  if (over_) return;
  over_ = true;
  --service_.load;
  CancelAll();
  // Frees what waits for the client's sake; the object itself may be held for a moment longer.
  backlog_.clear();
  choices_.clear();
}

void Generation::Fail(const ApiError& error) {
  if (over_) return;
  over_ = true;
  --service_.load;
  CancelAll();
  if (streaming_) {
    std::string out;
    AppendErrorEvent(out, error);
    out += kDoneEvent;
    exchange_->EndEvents(out);
  } else {
    HttpResponse response = ErrorResponse(error);
    for (auto& header : Headers()) response.headers.push_back(std::move(header));
    exchange_->Answer(std::move(response));
  }
}

void Generation::Pump() {
  pump_posted_ = false;
  if (over_) return;
  const size_t max_unsent = service_.server.options().max_unsent_bytes;
  if (call_.stream && exchange_->unsent_bytes() >= max_unsent) return;  // on_drained calls again
  if (backlog_begin_ == backlog_.size()) {
    backlog_.clear();
    backlog_begin_ = 0;
    for (size_t i = 0; i < outboxes_.size(); ++i) {
      for (TokenEvent& event : outboxes_[i]->Take())
        backlog_.push_back({static_cast<int>(i), std::move(event)});
    }
  }
  std::string out;
  while (!over_ && backlog_begin_ < backlog_.size() && (!call_.stream || out.size() < max_unsent)) {
    Handle(backlog_[backlog_begin_++], out);
  }
  if (over_) return;
  if (backlog_begin_ == backlog_.size()) std::vector<News>().swap(backlog_), backlog_begin_ = 0;
  if (num_finished_ == choices_.size()) return FinishAll(out);
  if (out.empty()) return;
  if (!std::exchange(streaming_, true)) exchange_->BeginEvents(Headers());
  exchange_->Write(out);
  // A client that took everything at once will not tell that it drained.
  if (!backlog_.empty() && exchange_->unsent_bytes() == 0 && !std::exchange(pump_posted_, true)) {
    service_.server.Post([self = shared_from_this()] { self->Pump(); });
  }
}

void Generation::Handle(News& news, std::string& out) {
  TokenEvent& event = news.event;
  const int index = news.prompt * call_.num_choices + event.choice;
  Choice& choice = choices_[static_cast<size_t>(index)];
  if (choice.finished) return;  // a stop string came first
  if (event.finish == FinishReason::kError || event.finish == FinishReason::kAbort) {
    // What was said before goes out before the error.
    if (!out.empty()) {
      if (!std::exchange(streaming_, true)) exchange_->BeginEvents(Headers());
      exchange_->Write(std::exchange(out, {}));
    }
    if (event.finish == FinishReason::kError) {
      choice.record.finish = "error";
      service_.metrics.OnSequenceEnd(choice.record);
      choice.finished = true;
      Error error = event.error;
      error.kind = ErrorKind::kInternal;
      return Fail(FromError(error));
    }
    return Fail({.status = 503,
                 .type = "ServiceUnavailableError",
                 .message = "the request was ended because the server is shutting down",
                 .retry_after_s = 5});
  }
  if (!std::exchange(choice.started, true)) {
    OnFirstEvent(choice, news.prompt, event);
    if (kind_ == CallKind::kChat && call_.stream) {
      const Usage usage = ChoiceUsage(choice);
      writer_->AppendChunk(out,
                           {.index = index,
                            .role_chunk = true,
                            .prompt_ids = call_.return_token_ids ? &request(news.prompt).prompt : nullptr,
                            .usage = call_.continuous_usage ? &usage : nullptr});
    }
  }
  for (const RowOutput& row : event.tokens) {
    OnToken(choice, index, event, row, out);
    if (choice.finished) return;
  }
  if (event.finish != FinishReason::kNone && !choice.finished) {
    CloseText(choice, event);
    FinishChoice(choice);
    if (call_.stream) EmitChunk(choice, index, true, out);
  }
}

void Generation::OnFirstEvent(Choice& choice, int prompt, TokenEvent& event) {
  const Request& request = this->request(prompt);
  SequenceRecord& record = choice.record;
  record.cached_tokens = event.num_cached_tokens;
  record.first_scheduled = event.first_scheduled;
  service_.metrics.OnStepTokens(event.time, record.prompt_tokens - record.cached_tokens);
  if (call_.prompt_logprobs_asked) {
    choice.prompt_logprobs = PromptLogprobsJson(service_.model.tokenizer, event.prompt);
  }
  if (!call_.echo) return;
  choice.text = prompts_[static_cast<size_t>(prompt)].echo_text;
  if (request.sampling.num_logprobs < 0) return;
  choice.logprobs.AddWithoutLogprob(request.prompt[0]);
  for (const RowOutput& row : event.prompt) choice.logprobs.Add(row);
}

void Generation::OnToken(Choice& choice, int index, const TokenEvent& event, const RowOutput& row,
                         std::string& out) {
  SequenceRecord& record = choice.record;
  service_.metrics.OnStepTokens(event.time, 1);
  if (record.generated_tokens == 0) {
    record.first_token = event.time;
    service_.metrics.OnFirstToken(arrival_, event.time, record.prompt_tokens, record.cached_tokens);
  } else {
    service_.metrics.OnNextToken(event.time - record.last_token);
  }
  record.last_token = event.time;
  ++record.generated_tokens;
  const bool is_last = event.finish != FinishReason::kNone && &row == &event.tokens.back();
  // The token that ended the answer has no text.
  const bool silent = is_last && event.finish == FinishReason::kStop && !call_.include_stop;
  if (!silent) AppendText(choice, choice.detokenizer.Push(row.token));
  if (request(index / call_.num_choices).sampling.num_logprobs >= 0) choice.logprobs.Add(row);
  if (call_.return_token_ids) choice.ids.push_back(row.token);
  const bool stopped = choice.detokenizer.stopped().has_value();
  if (stopped || is_last) CloseText(choice, event);
  const bool hidden = choice.parser.in_reasoning();
  if (hidden) ++choice.reasoning_tokens;
  if (stopped || is_last) {
    FinishChoice(choice);
    if (!is_last) {
      service_.model.engine.CancelChoice(request(index / call_.num_choices).id, event.choice);
    }
  }
  if (!call_.stream) return;
  if (hidden && !call_.include_reasoning) {
    choice.logprobs.Drop();
    choice.ids.clear();
  }
  EmitChunk(choice, index, choice.finished, out);
}

void Generation::AppendText(Choice& choice, std::string_view text) {
  if (!reasoning_on()) {
    choice.text += text;
    return;
  }
  const ParsedText parsed = choice.parser.Push(text);
  choice.text += parsed.content;
  if (call_.include_reasoning) choice.reasoning += parsed.reasoning;
}

// The rest of the text, and why it ended.
void Generation::CloseText(Choice& choice, const TokenEvent& event) {
  const auto& stopped = choice.detokenizer.stopped();
  if (!stopped) AppendText(choice, choice.detokenizer.Finish());
  if (reasoning_on()) {
    const ParsedText rest = choice.parser.Finish();
    choice.text += rest.content;
    if (call_.include_reasoning) choice.reasoning += rest.reasoning;
  }
  if (stopped) {
    choice.finish = "stop";
    AppendJsonString(choice.stop_reason, *stopped);
  } else if (event.finish == FinishReason::kStop) {
    choice.finish = "stop";
    if (event.stop_token >= 0) choice.stop_reason = std::to_string(event.stop_token);
  } else {
    choice.finish = "length";
  }
}

void Generation::FinishChoice(Choice& choice) {
  choice.finished = true;
  choice.record.finish = choice.finish;
  service_.metrics.OnSequenceEnd(choice.record);
  ++num_finished_;
}

void Generation::EmitChunk(Choice& choice, int index, bool force, std::string& out) {
  const bool first = kind_ == CallKind::kCompletion && choice.record.generated_tokens <= 1;
  if (!force && choice.text.empty() && choice.reasoning.empty() && choice.logprobs.empty() &&
      choice.ids.empty())
    return;
  const std::string logprobs = choice.logprobs.empty() ? std::string() : choice.logprobs.Take();
  const Usage usage = ChoiceUsage(choice);
  AnswerPiece piece = PieceOf(choice, index, logprobs);
  if (!first) piece.prompt_ids = nullptr;
  piece.usage = call_.continuous_usage ? &usage : nullptr;
  writer_->AppendChunk(out, piece);
  choice.text.clear();
  choice.reasoning.clear();
  choice.ids.clear();
}

// What a chunk and a whole answer say alike. Refers to `choice` and `logprobs`.
AnswerPiece Generation::PieceOf(const Choice& choice, int index, std::string_view logprobs) const {
  return {.index = index,
          .text = choice.text,
          .reasoning = choice.reasoning,
          .logprobs = logprobs,
          .finish = choice.finish,
          .stop_reason = choice.stop_reason,
          .token_ids = call_.return_token_ids ? &choice.ids : nullptr,
          .prompt_ids = call_.return_token_ids ? &request(index / call_.num_choices).prompt : nullptr};
}

void Generation::FinishAll(std::string& out) {
  over_ = true;
  --service_.load;
  for (size_t i = 0; i < prompts_.size(); ++i) {
    int64_t most = 0;
    for (int j = 0; j < call_.num_choices; ++j) {
      most = std::max(most, choices_[i * static_cast<size_t>(call_.num_choices) + static_cast<size_t>(j)]
                                .record.generated_tokens);
    }
    service_.metrics.OnRequestEnd(most);
  }
  if (!call_.stream) {
    exchange_->Answer({.body = WholeBody(), .headers = Headers()});
    return;
  }
  if (call_.include_usage) writer_->AppendUsageChunk(out, TotalUsage());
  out += kDoneEvent;
  if (!std::exchange(streaming_, true)) exchange_->BeginEvents(Headers());
  exchange_->EndEvents(out);
}

std::string Generation::WholeBody() {
  std::string choices;
  for (size_t i = 0; i < choices_.size(); ++i) {
    Choice& choice = choices_[i];
    const std::string logprobs = choice.logprobs.empty() ? std::string() : choice.logprobs.Take();
    AnswerPiece piece = PieceOf(choice, static_cast<int>(i), logprobs);
    piece.prompt_logprobs = choice.prompt_logprobs;
    writer_->AppendChoice(choices, piece);
  }
  return writer_->Whole(choices, TotalUsage(), choices_[0].prompt_logprobs,
                        call_.return_token_ids ? &request(0).prompt : nullptr);
}

Usage Generation::ChoiceUsage(const Choice& choice) const {
  return {.prompt_tokens = choice.record.prompt_tokens,
          .completion_tokens = choice.record.generated_tokens,
          .cached_tokens = choice.record.cached_tokens,
          .reasoning_tokens = choice.reasoning_tokens};
}

Usage Generation::TotalUsage() const {
  Usage usage;
  for (size_t i = 0; i < choices_.size(); ++i) {
    const Choice& choice = choices_[i];
    usage.completion_tokens += choice.record.generated_tokens;
    usage.reasoning_tokens += choice.reasoning_tokens;
    // The prompt counts once, however many answers it gets.
    if (i % static_cast<size_t>(call_.num_choices) == 0) {
      usage.prompt_tokens += choice.record.prompt_tokens;
      usage.cached_tokens += choice.record.cached_tokens;
    }
  }
  return usage;
}

}  // namespace tessera
