// Any bytes as the body of every endpoint that takes JSON. Nothing may crash, and what comes out keeps the
// promises that the engine and the templates rely on.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "base/check.h"
#include "http/openai.h"

namespace tessera {
namespace {

constexpr int kVocabSize = 2048;

const CallRules& Rules() {
  static const ApiOptions options = [] {
    ApiOptions made;
    made.model_names = {"tiny"};
    made.eos_ids = {1};
    made.max_model_len = 4096;
    made.default_chat_template_kwargs = R"({"enable_thinking":true})";
    return made;
  }();
  static const CallRules rules{options, kVocabSize};
  return rules;
}

void CheckSampling(const GenerationCall& call) {
  const SamplingParams& sampling = call.sampling;
  CHECK(sampling.temperature >= 0 && sampling.temperature <= 2);
  CHECK(sampling.top_p > 0 && sampling.top_p <= 1);
  CHECK_GE(sampling.top_k, 0);
  CHECK(sampling.repetition_penalty > 0);
  CHECK_LE(sampling.num_logprobs, 20);
  CHECK_LE(sampling.num_prompt_logprobs, 20);
  CHECK_GE(call.num_choices, 1);
  for (const auto& ids : {sampling.stop_token_ids, sampling.allowed_token_ids}) {
    for (const int32_t id : ids) CHECK(id >= 0 && id < kVocabSize);
  }
  for (const TokenBias& bias : sampling.logit_bias) CHECK(bias.token >= 0 && bias.token < kVocabSize);
  for (const PromptInput& prompt : call.prompts) {
    CHECK(prompt.is_text ? !prompt.text.empty() : !prompt.ids.empty());
    for (const int32_t id : prompt.ids) CHECK(id >= 0 && id < kVocabSize);
  }
}

// An error is always JSON of the one shape, whatever bytes it quotes.
void CheckError(const ApiError& error) {
  const auto body = ParseJson(ErrorBody(error));
  CHECK(body.has_value());
  CHECK(body->Find("error") != nullptr && body->Find("error")->Find("message") != nullptr);
  CHECK(error.status == 400 || error.status == 404);
}

template <typename T>
bool Holds(const ApiResult<T>& result) {
  if (!result) CheckError(result.error());
  return result.has_value();
}

void Try(std::string_view text) {
  const auto body = ParseBody(text);
  if (!Holds(body)) return;
  // What was read can be written and read again.
  std::string written;
  AppendJson(written, *body);
  CHECK(ParseJson(written).has_value());
  if (const auto call = ParseCompletionCall(*body, Rules()); Holds(call)) CheckSampling(*call);
  if (const auto call = ParseChatCall(*body, Rules()); Holds(call)) {
    CheckSampling(*call);
    CHECK(ParseJson(call->chat.messages).has_value());
    CHECK(ParseJson(call->chat.kwargs).has_value());
    CHECK(ParseJson(call->chat.tools).has_value());
  }
  Holds(ParseTokenizeCall(*body, Rules()));
  Holds(ParseDetokenizeCall(*body, Rules()));
}

}  // namespace
}  // namespace tessera

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  tessera::Try({reinterpret_cast<const char*>(data), size});
  return 0;
}
