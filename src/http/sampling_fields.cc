// See sampling_fields.h. Messages hold the fragments that clients of this API match.
#include "http/sampling_fields.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <limits>

namespace tessera {
namespace {

constexpr double kMinTemperature = 0.01;  // a smaller one that is not greedy is raised to it
constexpr double kGreedyTemperature = 1e-5;
constexpr size_t kMaxStopBytes = 4096;  // of one stop string: so much text may be held back
constexpr size_t kMaxBadWords = 1000;
constexpr size_t kMaxTokenList = size_t{1} << 20;

// A limit that the environment may change.
int64_t Limit(const char* variable, int64_t standard) {
  const char* text = std::getenv(variable);
  if (!text) return standard;
  const int64_t value = std::strtoll(text, nullptr, 10);
  return value > 0 ? value : standard;
}

ApiStatus CheckIds(const std::vector<int64_t>& ids, int vocab_size, const char* name) {
  if (ids.size() > kMaxTokenList)
    return BadRequest(name, Format("{} holds more than {} ids", name, kMaxTokenList));
  for (const int64_t id : ids) {
    if (id < 0 || id >= vocab_size) {
      return BadRequest(name, Format("{} contains the token id {}, out of vocabulary: ids are 0 to {}.", name,
                                     id, vocab_size - 1));
    }
  }
  return {};
}

}  // namespace

void SamplingFields::Read(FieldReader& fields, CallKind kind) {
  kind_ = kind;
  temperature_ = fields.Float("temperature");
  top_p_ = fields.Float("top_p");
  min_p_ = fields.Float("min_p");
  repetition_ = fields.Float("repetition_penalty");
  frequency_ = fields.Float("frequency_penalty");
  presence_ = fields.Float("presence_penalty");
  n_ = fields.Int("n");
  best_of_ = fields.Int("best_of");
  top_k_ = fields.Int("top_k");
  seed_ = fields.Int("seed");
  max_tokens_ = fields.Int("max_tokens");
  min_tokens_ = fields.Int("min_tokens");
  prompt_logprobs_ = fields.Int("prompt_logprobs");
  if (kind == CallKind::kChat) {
    max_completion_tokens_ = fields.Int("max_completion_tokens");
    chat_logprobs_ = fields.Bool("logprobs", false);
    top_logprobs_ = fields.Int("top_logprobs");
  } else {
    logprobs_ = fields.Int("logprobs");
    echo_ = fields.Bool("echo", false);
  }
  stop_ = fields.Strings("stop");
  bad_words_ = fields.Strings("bad_words");
  stop_token_ids_ = fields.Ints("stop_token_ids");
  has_allowed_ = fields.Has("allowed_token_ids");
  allowed_token_ids_ = fields.Ints("allowed_token_ids");
  if (const JsonObject* biases = fields.Object("logit_bias")) {
    for (const JsonMember& member : *biases) {
      const auto bias = ToFloat(member.value);
      if (!bias) fields.Report("logit_bias", "Input should be a valid number");
      logit_bias_.emplace_back(member.key, bias.value_or(0));
    }
  }
  cache_salt_ = fields.String("cache_salt");
  request_id_ = fields.String("request_id");
  ignore_eos_ = fields.Bool("ignore_eos", false);
  include_stop_ = fields.Bool("include_stop_str_in_output", false);
  skip_special_ = fields.Bool("skip_special_tokens", true);
  fields.Bool("spaces_between_special_tokens", true);
  return_ids_ = fields.Bool("return_token_ids", false);
  tokens_as_ids_ = fields.Bool("return_tokens_as_token_ids", false);
  stream_ = fields.Bool("stream", false);
  if (const JsonValue* options = fields.Get("stream_options")) {
    if (fields.Object("stream_options")) {
      has_stream_options_ = true;
      FieldReader inner(*options, "body.stream_options");
      include_usage_ = inner.Bool("include_usage", false);
      continuous_usage_ = inner.Bool("continuous_usage_stats", false);
      if (inner.TypeErrors()) fields.Report("stream_options", "Input should hold valid booleans");
    }
  }
}

ApiStatus SamplingFields::Check(const CallRules& rules, GenerationCall& call) const {
  call.kind = kind_;
  call.echo = echo_;
  call.request_id = request_id_.value_or("").substr(0, 256);
  call.sampling.ignore_eos = ignore_eos_;
  call.include_stop = include_stop_;
  call.skip_special_tokens = skip_special_;
  call.return_token_ids = return_ids_;
  call.tokens_as_ids = tokens_as_ids_;
  call.sampling.eos_ids = rules.options.eos_ids;
  if (auto status = CheckStreaming(rules, call); !status) return status;
  if (auto status = CheckNumbers(rules, call); !status) return status;
  if (auto status = CheckLengths(call); !status) return status;
  if (auto status = CheckStops(rules, call); !status) return status;
  if (auto status = CheckTokens(rules, call); !status) return status;
  return CheckLogprobs(rules, call);
}

ApiStatus SamplingFields::CheckNumbers(const CallRules& rules, GenerationCall& call) const {
  const DefaultSampling& standard = rules.options.sampling;
  double temperature = temperature_.value_or(standard.temperature);
  double top_p = top_p_.value_or(standard.top_p);
  int64_t top_k = top_k_.value_or(standard.top_k);
  double min_p = min_p_.value_or(standard.min_p);
  const double repetition = repetition_.value_or(standard.repetition_penalty);
  const double frequency = frequency_.value_or(0);
  const double presence = presence_.value_or(0);
  const auto bad = [](const char* name, const char* rule, const std::string& value) {
    return BadRequest(name, Format("{} must be {}, got {}.", name, rule, value));
  };
  if (!(temperature >= 0)) return bad("temperature", "non-negative", FloatText(temperature));
  if (temperature > 2) return bad("temperature", "in [0, 2]", FloatText(temperature));
  if (!(top_p > 0 && top_p <= 1)) return bad("top_p", "in (0, 1]", FloatText(top_p));
  if (top_k < -1) return bad("top_k", "0 (disable), or at least 1", std::to_string(top_k));
  if (top_k > std::numeric_limits<int32_t>::max())
    return bad("top_k", "at most 2147483647", std::to_string(top_k));
  if (!(min_p >= 0 && min_p <= 1)) return bad("min_p", "in [0, 1]", FloatText(min_p));
  if (!(repetition > 0)) return bad("repetition_penalty", "greater than zero", FloatText(repetition));
  const float narrow = static_cast<float>(repetition);
  if (!std::isfinite(narrow) || narrow == 0) {
    return bad("repetition_penalty", "finite in 32 bits", FloatText(repetition));
  }
  if (!(std::abs(frequency) <= 2)) return bad("frequency_penalty", "in [-2, 2]", FloatText(frequency));
  if (!(std::abs(presence) <= 2)) return bad("presence_penalty", "in [-2, 2]", FloatText(presence));
  const int64_t max_n = Limit("VLLM_MAX_N_SEQUENCES", 16384);
  const int64_t n = n_.value_or(1);
  if (n < 1) return bad("n", "at least 1", std::to_string(n));
  if (n > max_n) return bad("n", Format("at most {}", max_n).c_str(), std::to_string(n));
  if (best_of_.value_or(1) != 1) return bad("best_of", "1 or null", std::to_string(*best_of_));
  if (temperature < kGreedyTemperature) {
    if (n > 1) return bad("n", "1 when using greedy sampling", std::to_string(n));
    temperature = 0;
    top_p = 1;
    top_k = 0;
    min_p = 0;
  } else {
    temperature = std::max(temperature, kMinTemperature);
  }
  call.num_choices = static_cast<int>(n);
  // -1 is "none"; any other value of 64 bits is a seed.
  if (seed_ && *seed_ != -1) call.seed = static_cast<uint64_t>(*seed_);
  call.sampling.temperature = static_cast<float>(temperature);
  // A tiny positive top_p must not become 0.
  call.sampling.top_p = std::max(static_cast<float>(top_p), std::numeric_limits<float>::min());
  call.sampling.top_k = static_cast<int32_t>(std::max<int64_t>(top_k, 0));
  call.sampling.min_p = static_cast<float>(min_p);
  call.sampling.repetition_penalty = narrow;
  call.sampling.frequency_penalty = static_cast<float>(frequency);
  call.sampling.presence_penalty = static_cast<float>(presence);
  return {};
}

ApiStatus SamplingFields::CheckLengths(GenerationCall& call) const {
  const bool by_new_name = max_completion_tokens_.has_value();
  const char* name = by_new_name ? "max_completion_tokens" : "max_tokens";
  std::optional<int64_t> max_tokens = by_new_name ? max_completion_tokens_ : max_tokens_;
  if (!max_tokens && kind_ == CallKind::kCompletion) max_tokens = 16;
  if (max_tokens) {
    const int64_t least = echo_ ? 0 : 1;
    if (*max_tokens < least) {
      return BadRequest(name, Format("{} must be at least {}, got {}.", name, least, *max_tokens));
    }
    // Whether it fits the model is decided with the length of the prompt.
    call.max_tokens =
        static_cast<int32_t>(std::min<int64_t>(*max_tokens, std::numeric_limits<int32_t>::max()));
  }
  const int64_t min_tokens = min_tokens_.value_or(0);
  if (min_tokens < 0) {
    return BadRequest("min_tokens",
                      Format("min_tokens must be greater than or equal to 0, got {}.", min_tokens));
  }
  if (min_tokens > max_tokens.value_or(std::numeric_limits<int32_t>::max())) {
    return BadRequest("min_tokens",
                      Format("min_tokens must be less than or equal to max_tokens={}, got {}.",
                             max_tokens.value_or(std::numeric_limits<int32_t>::max()), min_tokens));
  }
  call.sampling.min_tokens = static_cast<int32_t>(min_tokens);
  return {};
}

ApiStatus SamplingFields::CheckStops(const CallRules& rules, GenerationCall& call) const {
  const int64_t max_stops = Limit("VLLM_MAX_STOP_STRINGS", 64);
  if (static_cast<int64_t>(stop_.size()) > max_stops) {
    return BadRequest("stop",
                      Format("stop holds {} strings, at most {} are allowed.", stop_.size(), max_stops));
  }
  for (const std::string& text : stop_) {
    if (text.empty()) return BadRequest("stop", "stop cannot contain an empty string.");
    if (text.size() > kMaxStopBytes) {
      return BadRequest(
          "stop", Format("a stop string has {} bytes, at most {} are allowed.", text.size(), kMaxStopBytes));
    }
  }
  call.stop = stop_;
  if (auto status = CheckIds(stop_token_ids_, rules.vocab_size, "stop_token_ids"); !status) return status;
  call.sampling.stop_token_ids.assign(stop_token_ids_.begin(), stop_token_ids_.end());
  return {};
}

ApiStatus SamplingFields::CheckTokens(const CallRules& rules, GenerationCall& call) const {
  if (has_allowed_ && allowed_token_ids_.empty()) {
    return BadRequest("allowed_token_ids", "allowed_token_ids must not be empty; null allows all tokens.");
  }
  if (auto status = CheckIds(allowed_token_ids_, rules.vocab_size, "allowed_token_ids"); !status)
    return status;
  call.sampling.allowed_token_ids.assign(allowed_token_ids_.begin(), allowed_token_ids_.end());
  if (bad_words_.size() > kMaxBadWords) {
    return BadRequest("bad_words", Format("bad_words holds more than {} words.", kMaxBadWords));
  }
  for (const std::string& word : bad_words_) {
    if (word.empty()) return BadRequest("bad_words", "bad_words cannot contain an empty string.");
    if (word.size() > kMaxStopBytes) return BadRequest("bad_words", "a bad word is longer than 4096 bytes.");
  }
  call.bad_words = bad_words_;
  for (const auto& [key, bias] : logit_bias_) {
    int64_t id = 0;
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), id);
    if (error != std::errc() || end != key.data() + key.size()) {
      return BadRequest("logit_bias", "logit_bias has a key that is not a token id in decimal digits.");
    }
    if (id < 0 || id >= rules.vocab_size) {
      return BadRequest("logit_bias",
                        Format("logit_bias contains the token id {}, out of vocabulary: ids are 0 to "
                               "{}.",
                               id, rules.vocab_size - 1));
    }
    call.sampling.logit_bias.push_back(
        {static_cast<int32_t>(id), static_cast<float>(std::clamp(bias, -100.0, 100.0))});
  }
  std::sort(call.sampling.logit_bias.begin(), call.sampling.logit_bias.end(),
            [](const TokenBias& a, const TokenBias& b) { return a.token < b.token; });
  const auto same = [](const TokenBias& a, const TokenBias& b) { return a.token == b.token; };
  const auto& sorted = call.sampling.logit_bias;
  if (std::adjacent_find(sorted.begin(), sorted.end(), same) != sorted.end()) {
    return BadRequest("logit_bias", "logit_bias names a token id twice.");
  }
  if (cache_salt_) {
    const bool allowed = !cache_salt_->empty() && cache_salt_->size() <= 128 &&
                         cache_salt_->find_first_of(std::string_view("@/\\\0", 4)) == std::string::npos;
    if (!allowed)
      return BadRequest("cache_salt", "cache_salt must have 1 to 128 bytes and none of @ / \\ NUL.");
    call.cache_salt = *cache_salt_;
  }
  return {};
}

ApiStatus SamplingFields::CheckLogprobs(const CallRules& rules, GenerationCall& call) const {
  const int64_t max = rules.options.max_logprobs < 0 ? rules.vocab_size : rules.options.max_logprobs;
  // -1 asks for the whole vocabulary.
  const auto count = [&](int64_t value, const char* name, const char* what) -> ApiResult<int32_t> {
    if (value < -1) return BrokenRule(name, Format("`{}` must be non-negative or -1, got {}.", name, value));
    const int64_t wanted = value == -1 ? rules.vocab_size : value;
    if (wanted > max) {
      return BadRequest(name, Format("Requested {} logprobs of {}, which is greater than max allowed: {}.",
                                     what, wanted, max));
    }
    return static_cast<int32_t>(wanted);
  };
  if (kind_ == CallKind::kChat) {
    if (top_logprobs_.value_or(0) != 0 && !chat_logprobs_) {
      return BrokenRule("top_logprobs", "when using `top_logprobs`, `logprobs` must be set to true.");
    }
    const auto top = count(top_logprobs_.value_or(0), "top_logprobs", "sample");
    if (!top) return std::unexpected(top.error());
    if (chat_logprobs_) call.sampling.num_logprobs = *top;
  } else if (logprobs_) {
    const auto top = count(*logprobs_, "logprobs", "sample");
    if (!top) return std::unexpected(top.error());
    call.sampling.num_logprobs = *top;
    if (echo_) call.sampling.num_prompt_logprobs = *top;
  }
  if (prompt_logprobs_) {
    if (*prompt_logprobs_ != 0 && stream_) {
      return BrokenRule("prompt_logprobs", "`prompt_logprobs` are not available when `stream=True`.");
    }
    const auto top = count(*prompt_logprobs_, "prompt_logprobs", "prompt");
    if (!top) return std::unexpected(top.error());
    call.prompt_logprobs_asked = !stream_;
    call.sampling.num_prompt_logprobs = std::max(call.sampling.num_prompt_logprobs, *top);
  }
  return {};
}

ApiStatus SamplingFields::CheckStreaming(const CallRules& rules, GenerationCall& call) const {
  if (has_stream_options_ && !stream_) {
    return BrokenRule("stream_options", "Stream options can only be defined when `stream=True`.");
  }
  call.stream = stream_;
  call.include_usage = include_usage_ || rules.options.enable_force_include_usage;
  call.continuous_usage = call.include_usage && continuous_usage_;
  return {};
}

}  // namespace tessera
