// The fields that both generation endpoints share: sampling, lengths, logprobs, streaming; and the names that
// are refused. Used by the two call parsers only.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "http/fields.h"

namespace tessera {

class SamplingFields {
 public:
  // Types only; errors are collected in `fields`.
  void Read(FieldReader& fields, CallKind kind);
  // Ranges and rules; fills everything of `call` that they decide.
  ApiStatus Check(const CallRules& rules, GenerationCall& call) const;

 private:
  ApiStatus CheckNumbers(const CallRules& rules, GenerationCall& call) const;
  ApiStatus CheckLengths(GenerationCall& call) const;
  ApiStatus CheckStops(const CallRules& rules, GenerationCall& call) const;
  ApiStatus CheckTokens(const CallRules& rules, GenerationCall& call) const;
  ApiStatus CheckLogprobs(const CallRules& rules, GenerationCall& call) const;
  ApiStatus CheckStreaming(const CallRules& rules, GenerationCall& call) const;

  CallKind kind_ = CallKind::kCompletion;
  std::optional<double> temperature_, top_p_, min_p_, repetition_, frequency_, presence_;
  std::optional<int64_t> n_, best_of_, top_k_, seed_, max_tokens_, max_completion_tokens_, min_tokens_;
  std::optional<int64_t> logprobs_, top_logprobs_, prompt_logprobs_;
  bool chat_logprobs_ = false;
  bool has_stream_options_ = false;
  std::vector<std::string> stop_, bad_words_;
  std::vector<int64_t> stop_token_ids_, allowed_token_ids_;
  bool has_allowed_ = false;
  std::vector<std::pair<std::string, double>> logit_bias_;
  std::optional<std::string> cache_salt_, request_id_;
  bool stream_ = false, include_usage_ = false, continuous_usage_ = false, ignore_eos_ = false, echo_ = false;
  bool include_stop_ = false, skip_special_ = true, return_ids_ = false, tokens_as_ids_ = false;
};

// Refuses the fields that are documented but not there, by name, and warns once per ignored name.
ApiStatus RefuseUnsupported(FieldReader& fields, CallKind kind);

// 404 when the body names a model that is not served.
ApiStatus CheckModel(FieldReader& fields, const ApiOptions& options);

}  // namespace tessera
