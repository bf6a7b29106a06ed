// One request's life: bytes -> call -> prompts -> engine -> text -> answer or event stream. Parsing,
// templates and tokenizing run on a background thread; everything else on the io thread.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "http/answer.h"
#include "http/service.h"
#include "text/detokenizer.h"
#include "text/output_parser.h"

namespace tessera {

class Generation : public std::enable_shared_from_this<Generation> {
 public:
  // Begins at once. The exchange keeps the object alive.
  static void Start(Service& service, CallKind kind, HttpRequest http, std::shared_ptr<Exchange> exchange);
  ~Generation();

  // Takes news out of the outboxes, as far as the client keeps up.
  void Pump();

 private:
  // One sequence.
  struct Choice {
    Choice(const Tokenizer& tokenizer, const StopRules& rules, bool reasoning, const LogprobStyle& style)
        : detokenizer(tokenizer, rules), parser(reasoning), logprobs(tokenizer, style) {}
    Detokenizer detokenizer;
    ReasoningParser parser;
    LogprobText logprobs;
    bool started = false;  // the first event was seen
    bool finished = false;
    std::string text, reasoning;      // not streamed: all; streamed: what the next chunk says
    std::vector<int32_t> ids;         // likewise
    std::string finish, stop_reason;  // for the answer; stop_reason is JSON
    std::string prompt_logprobs;      // JSON
    int64_t reasoning_tokens = 0;
    SequenceRecord record;
  };
  struct News {
    int prompt = 0;
    TokenEvent event;
  };

  Generation(Service& service, CallKind kind, std::shared_ptr<Exchange> exchange);
  void Prepare(HttpRequest http);  // background
  void Submit();
  void MakeChoices();
  void Fail(const ApiError& error);
  void OnClosed();
  void CancelAll();
  void Handle(News& news, std::string& out);
  void OnFirstEvent(Choice& choice, int prompt, TokenEvent& event);
  void OnToken(Choice& choice, int index, const TokenEvent& event, const RowOutput& row, std::string& out);
  void CloseText(Choice& choice, const TokenEvent& event);
  void AppendText(Choice& choice, std::string_view text);
  AnswerPiece PieceOf(const Choice& choice, int index, std::string_view logprobs) const;
  void EmitChunk(Choice& choice, int index, bool force, std::string& out);
  void FinishChoice(Choice& choice);
  void FinishAll(std::string& out);
  std::string WholeBody();
  Usage TotalUsage() const;
  Usage ChoiceUsage(const Choice& choice) const;
  const Request& request(int prompt) const { return *prompts_[static_cast<size_t>(prompt)].request; }
  bool reasoning_on() const;
  std::vector<std::pair<std::string, std::string>> Headers() const;

  Service& service_;
  const CallKind kind_;
  std::shared_ptr<Exchange> exchange_;
  const TimeNs arrival_;
  std::string id_;  // as the client sees it, without prefix
  uint64_t seed_ = 0;
  GenerationCall call_;
  std::optional<ApiError> refusal_;
  std::vector<PreparedPrompt> prompts_;
  std::vector<std::shared_ptr<Outbox>> outboxes_;  // one per submitted prompt
  std::vector<Choice> choices_;                    // prompt * n + sample
  std::vector<News> backlog_;                      // taken out, not yet said
  size_t backlog_begin_ = 0;
  std::optional<AnswerWriter> writer_;
  size_t num_finished_ = 0;
  bool streaming_ = false;  // the head of the event stream is out
  bool over_ = false;
  bool pump_posted_ = false;
};

}  // namespace tessera
