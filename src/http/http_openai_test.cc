// Request bodies -> checked calls: what is accepted, and the exact words and places of every refusal.
#include "http/openai.h"

#include <gtest/gtest.h>

namespace tessera {
namespace {

const ApiOptions& Options() {
  static const ApiOptions options = [] {
    ApiOptions made;
    made.model_names = {"m", "alias"};
    made.sampling = {.temperature = 0.6, .top_p = 0.95};
    made.eos_ids = {1};
    made.max_model_len = 100;
    return made;
  }();
  return options;
}

ApiResult<GenerationCall> Parse(CallKind kind, std::string_view text) {
  const CallRules rules{Options(), 1000};
  auto body = ParseBody(text);
  if (!body) return std::unexpected(body.error());
  return kind == CallKind::kChat ? ParseChatCall(*body, rules) : ParseCompletionCall(*body, rules);
}
ApiResult<GenerationCall> Completion(const std::string& fields) {
  return Parse(CallKind::kCompletion, "{\"prompt\":\"hi\"" + (fields.empty() ? "" : "," + fields) + "}");
}
ApiResult<GenerationCall> Chat(const std::string& fields) {
  return Parse(CallKind::kChat, R"({"messages":[{"role":"user","content":"hi"}])" +
                                    (fields.empty() ? "" : "," + fields) + "}");
}

struct Refusal {
  std::string fields;
  std::string param;
  std::string fragment;
  std::string type = "BadRequestError";
  int status = 400;
};

void ExpectRefusals(ApiResult<GenerationCall> (*parse)(const std::string&),
                    const std::vector<Refusal>& refusals) {
  for (const Refusal& wanted : refusals) {
    const auto call = parse(wanted.fields);
    ASSERT_FALSE(call) << wanted.fields;
    EXPECT_EQ(call.error().status, wanted.status) << wanted.fields;
    EXPECT_EQ(call.error().type, wanted.type) << wanted.fields;
    EXPECT_EQ(call.error().param, wanted.param) << wanted.fields;
    EXPECT_NE(call.error().message.find(wanted.fragment), std::string::npos) << wanted.fields << "\n"
                                                                             << call.error().message;
  }
}

TEST(OpenAiTest, DefaultsComeFromTheModelThenFromTheApi) {
  const auto call = Completion("").value();
  EXPECT_FLOAT_EQ(call.sampling.temperature, 0.6F);
  EXPECT_FLOAT_EQ(call.sampling.top_p, 0.95F);
  EXPECT_EQ(call.sampling.top_k, 0);
  EXPECT_EQ(call.max_tokens, 16);
  EXPECT_EQ(call.num_choices, 1);
  EXPECT_FALSE(call.seed);
  EXPECT_EQ(call.sampling.num_logprobs, -1);
  EXPECT_EQ(call.sampling.eos_ids, std::vector<int32_t>{1});
  EXPECT_TRUE(call.skip_special_tokens);
  EXPECT_FALSE(call.include_usage);
  EXPECT_FALSE(Chat("").value().max_tokens);
}

TEST(OpenAiTest, NullIsAbsentAndUnknownFieldsAreAccepted) {
  const auto call = Completion(R"("temperature":null,"max_tokens":null,"n":null,"stop":null,"model":null,
      "logit_bias":null,"logprobs":null,"stream_options":null,"foo":{"bar":[1]},"best_of":1,"user":"x")");
  ASSERT_TRUE(call);
  EXPECT_EQ(call->max_tokens, 16);
}

TEST(OpenAiTest, ReadsEverySamplingField) {
  const auto call =
      Completion(
          R"("model":"alias","temperature":1.5,"top_p":0.5,"top_k":7,"min_p":0.1,"repetition_penalty":1.1,
      "frequency_penalty":-1,"presence_penalty":2,"seed":-5,"n":3,"max_tokens":9,"min_tokens":2,
      "ignore_eos":true,
      "stop":["a","b"],"stop_token_ids":[4,5.0],"logit_bias":{"7":200,"3":-1.5},"allowed_token_ids":[1,2],
      "bad_words":["w"],"logprobs":5,"stream":true,"stream_options":{"include_usage":true,
      "continuous_usage_stats":true},"include_stop_str_in_output":true,"skip_special_tokens":false,
      "return_token_ids":true,"return_tokens_as_token_ids":true,"cache_salt":"s","request_id":"r")")
          .value();
  EXPECT_EQ(call.seed, static_cast<uint64_t>(-5));
  EXPECT_EQ(call.num_choices, 3);
  EXPECT_EQ(call.sampling.top_k, 7);
  EXPECT_EQ(call.sampling.min_tokens, 2);
  EXPECT_TRUE(call.sampling.ignore_eos);
  EXPECT_EQ(call.stop, (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(call.sampling.stop_token_ids, (std::vector<int32_t>{4, 5}));
  ASSERT_EQ(call.sampling.logit_bias.size(), 2U);
  EXPECT_EQ(call.sampling.logit_bias[1].token, 7);
  EXPECT_EQ(call.sampling.logit_bias[1].bias, 100);
  EXPECT_EQ(call.sampling.num_logprobs, 5);
  EXPECT_EQ(call.sampling.num_prompt_logprobs, -1);
  EXPECT_TRUE(call.stream && call.include_usage && call.continuous_usage && call.include_stop);
  EXPECT_TRUE(call.return_token_ids && call.tokens_as_ids && !call.skip_special_tokens);
  EXPECT_EQ(call.cache_salt, "s");
  EXPECT_EQ(call.request_id, "r");
  EXPECT_FALSE(Completion("\"seed\":-1").value().seed);
}

TEST(OpenAiTest, GreedyForcesTheOtherFiltersOff) {
  const auto call = Completion(R"("temperature":0,"top_p":0.5,"top_k":3,"min_p":0.5)").value();
  EXPECT_EQ(call.sampling.temperature, 0);
  EXPECT_EQ(call.sampling.top_p, 1);
  EXPECT_EQ(call.sampling.top_k, 0);
  EXPECT_EQ(call.sampling.min_p, 0);
  EXPECT_FLOAT_EQ(Completion("\"temperature\":0.001").value().sampling.temperature, 0.01F);
}

TEST(OpenAiTest, EchoBringsPromptLogprobsAndAllowsNoTokens) {
  const auto call = Completion(R"("echo":true,"logprobs":2,"max_tokens":0)").value();
  EXPECT_EQ(call.sampling.num_prompt_logprobs, 2);
  EXPECT_EQ(call.max_tokens, 0);
  ExpectRefusals(Completion, {{"\"max_tokens\":0", "max_tokens", "max_tokens must be at least 1, got 0."}});
}

TEST(OpenAiTest, RangesOfSampling) {
  ExpectRefusals(
      Completion,
      {{"\"top_p\":5", "top_p", "top_p must be in (0, 1], got 5.0."},
       {"\"top_p\":0", "top_p", "top_p must be in (0, 1], got 0.0."},
       {"\"temperature\":-2", "temperature", "temperature must be non-negative, got -2.0."},
       {"\"temperature\":2.5", "temperature", "temperature must be in [0, 2], got 2.5."},
       {"\"repetition_penalty\":-2", "repetition_penalty",
        "repetition_penalty must be greater than zero, got -2.0."},
       {"\"repetition_penalty\":1e300", "repetition_penalty", "finite"},
       {"\"top_k\":-5", "top_k", "top_k must be 0 (disable), or at least 1, got -5."},
       {"\"top_k\":9223372036854775807", "top_k", "top_k must be"},
       {"\"min_p\":1.5", "min_p", "min_p must be in [0, 1], got 1.5."},
       {"\"frequency_penalty\":3", "frequency_penalty", "frequency_penalty must be in [-2, 2], got 3.0."},
       {"\"presence_penalty\":-3", "presence_penalty", "presence_penalty must be in [-2, 2], got -3.0."},
       {"\"n\":0", "n", "n must be at least 1, got 0."},
       {"\"n\":16385", "n", "n must be at most 16384"},
       {"\"n\":2,\"temperature\":0", "n", "n must be 1 when using greedy sampling, got 2."},
       {"\"best_of\":2", "best_of", "best_of must be 1"},
       {"\"max_tokens\":-1", "max_tokens", "max_tokens must be at least 1, got -1."},
       {"\"min_tokens\":-1", "min_tokens", "min_tokens must be greater than or equal to 0, got -1."},
       {"\"min_tokens\":20", "min_tokens", "min_tokens must be less than or equal to max_tokens=16, got 20."},
       {"\"logprobs\":21", "logprobs", "greater than max allowed: 20"},
       {"\"logprobs\":-1", "logprobs", "greater than max allowed: 20"},
       {"\"prompt_logprobs\":21", "prompt_logprobs", "greater than max allowed: 20"},
       {"\"stop\":\"\"", "stop", "stop cannot contain an empty string."},
       {"\"stop_token_ids\":[1000]", "stop_token_ids", "out of vocabulary"},
       {"\"allowed_token_ids\":[-1]", "allowed_token_ids", "out of vocabulary"},
       {"\"allowed_token_ids\":[]", "allowed_token_ids", "must not be empty"},
       {"\"logit_bias\":{\"1000\":1}", "logit_bias", "out of vocabulary"},
       {"\"logit_bias\":{\"x\":1}", "logit_bias", "not a token id"},
       {"\"logit_bias\":{\"1\":1,\"01\":1}", "logit_bias", "names a token id twice"},
       {"\"bad_words\":[\"\"]", "bad_words", "bad_words cannot contain an empty string."},
       {"\"cache_salt\":\"a/b\"", "cache_salt", "none of"},
       {"\"priority\":1", "priority", "--scheduling-policy priority"}});
}

TEST(OpenAiTest, TypeErrorsAreCountedAndPlaced) {
  const std::string type = "Bad Request";
  ExpectRefusals(
      Completion,
      {{"\"top_k\":-0.2", "body.top_k",
        "Input should be a valid integer, got a number with a fractional part", type},
       {"\"model\":1", "body.model", "Input should be a valid string", type},
       {"\"n\":\"2\"", "body.n", "1 validation error:\n  body.n: Input should be a valid integer", type},
       {"\"n\":true", "body.n", "Input should be a valid integer", type},
       {"\"seed\":9223372036854775808", "body.seed", "64 bits", type},
       {"\"stream\":\"yes\",\"top_p\":[]", "body.top_p", "2 validation errors:", type},
       {"\"stop\":[1]", "body.stop.0", "Input should be a valid string", type},
       {"\"stop\":1", "body.stop", "valid list", type},
       {"\"logit_bias\":[]", "body.logit_bias", "Input should be a valid dictionary", type},
       {"\"stream_options\":{\"include_usage\":1},\"stream\":true", "body.stream_options", "boolean", type},
       {"\"stream_options\":{}", "stream_options", "stream=True", type},
       {"\"prompt_logprobs\":1,\"stream\":true", "prompt_logprobs", "stream=True", type},
       {"\"logprobs\":-2", "logprobs", "non-negative", type}});
}

TEST(OpenAiTest, UnknownModel) {
  ExpectRefusals(Completion,
                 {{"\"model\":\"X\"", "model", "The model `X` does not exist.", "NotFoundError", 404}});
}

TEST(OpenAiTest, PromptsInEveryForm) {
  const auto prompts = [](std::string_view prompt) {
    return Parse(CallKind::kCompletion, "{\"prompt\":" + std::string(prompt) + "}");
  };
  EXPECT_EQ(prompts("\"a\"")->prompts[0].text, "a");
  EXPECT_EQ(prompts("[\"a\",\"b\"]")->prompts[1].text, "b");
  EXPECT_EQ(prompts("[5,6]")->prompts[0].ids, (std::vector<int32_t>{5, 6}));
  EXPECT_EQ(prompts("[[5],[6,7]]")->prompts[1].ids, (std::vector<int32_t>{6, 7}));
  struct Case {
    const char* prompt;
    const char* param;
    const char* fragment;
  };
  for (const Case& wanted :
       {Case{"1", "body.prompt", "Input should be a valid list"},
        Case{"{}", "body.prompt", "Input should be a valid list"},
        Case{"null", "body.prompt", "Field required"},
        Case{"\"\"", "prompt", "The decoder prompt cannot be empty"},
        Case{"[]", "prompt", "The decoder prompt cannot be empty"},
        Case{"[[]]", "prompt", "The decoder prompt cannot be empty"},
        Case{"[\"a\",\"\"]", "prompt", "The decoder prompt cannot be empty"},
        Case{"[1000]", "prompt", "Token id 1000 is out of vocabulary"},
        Case{"[-1]", "prompt", "out of vocabulary"},
        Case{"[18446744073709551615]", "prompt", "out of vocabulary"},
        Case{"[1,\"a\"]", "body.prompt", "valid integer"}, Case{"[1.5]", "body.prompt", "valid integer"},
        Case{"[\"a\",1]", "body.prompt", "valid list"}, Case{"[true]", "body.prompt", "valid integer"}}) {
    const auto call = prompts(wanted.prompt);
    ASSERT_FALSE(call) << wanted.prompt;
    EXPECT_EQ(call.error().param, wanted.param) << wanted.prompt;
    EXPECT_NE(call.error().message.find(wanted.fragment), std::string::npos) << call.error().message;
  }
}

TEST(OpenAiTest, WorkIsBoundedBeforeItIsDone) {
  std::string many = "[\"a\"";
  for (int i = 1; i < 2000; ++i) many += ",\"a\"";
  const auto call = Parse(CallKind::kCompletion, "{\"n\":9,\"temperature\":1,\"prompt\":" + many + "]}");
  ASSERT_FALSE(call);
  EXPECT_NE(call.error().message.find("18000 sequences, at most 16384"), std::string::npos)
      << call.error().message;
  std::string fields = "{\"prompt\":\"a\"";
  for (int i = 0; i < 1001; ++i) fields += Format(",\"x{}\":1", i);
  EXPECT_FALSE(Parse(CallKind::kCompletion, fields + "}"));
}

TEST(OpenAiTest, UnsupportedFieldsAreRefusedByName) {
  std::vector<Refusal> refusals;
  for (const char* name :
       {"logits_processors", "guided_json", "guided_regex", "structured_outputs", "documents",
        "kv_transfer_params", "truncate_prompt_tokens", "repetition_detection"}) {
    refusals.push_back({Format("\"{}\":\"x\"", name), name, "is not supported by Tessera"});
  }
  refusals.push_back({"\"use_beam_search\":true", "use_beam_search", "not supported by Tessera"});
  refusals.push_back({"\"thinking_token_budget\":5", "thinking_token_budget", "not supported by Tessera"});
  refusals.push_back(
      {"\"response_format\":{\"type\":\"json_object\"}", "response_format", "not supported by"});
  refusals.push_back(
      {"\"response_format\":{\"type\":\"json_schema\"}", "response_format", "json_schema", "Bad Request"});
  ExpectRefusals(Completion, refusals);
  ExpectRefusals(Chat, refusals);
  ExpectRefusals(Completion, {{"\"suffix\":\"x\"", "suffix", "not supported by Tessera"}});
  const std::string tools = R"("tools":[{"type":"function","function":{"name":"f"}}])";
  ExpectRefusals(Chat,
                 {{"\"echo\":true", "echo", "not supported by Tessera"},
                  {"\"chat_template\":\"x\"", "", "not trusted"},
                  {"\"tools\":[]", "tools", "empty", "Bad Request"},
                  {tools, "tools", "--enable-auto-tool-choice and --tool-call-parser"},
                  {tools + ",\"tool_choice\":\"required\"", "tool_choice", "not supported by Tessera"}});
  EXPECT_TRUE(Completion(R"("suffix":"","use_beam_search":false,"response_format":{"type":"text"},
                            "guided_decoding_backend":"x","thinking_token_budget":-1)"));
  const auto none = Chat(tools + ",\"tool_choice\":\"none\"");
  ASSERT_TRUE(none);
  EXPECT_EQ(none->chat.tools, R"([{"type":"function","function":{"name":"f"}}])");
}

TEST(OpenAiTest, ChatMessagesBecomeTemplateInput) {
  const auto call = Parse(CallKind::kChat, R"({"messages":[
      {"role":"system","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]},
      {"role":"aaaa","content":null,"tool_calls":[{"id":"1"}],"reasoning":"r"},
      {"role":"assistant","content":"x"}],
      "add_generation_prompt":false,"continue_final_message":true,
      "chat_template_kwargs":{"k":1},"reasoning_effort":"low"})")
                        .value();
  EXPECT_EQ(call.chat.messages,
            R"([{"role":"system","content":"a\nb"},{"role":"aaaa","content":null,"tool_calls":[{"id":"1"}],)"
            R"("reasoning":"r","reasoning_content":"r"},{"role":"assistant","content":"x"}])");
  EXPECT_EQ(call.chat.kwargs, R"({"reasoning_effort":"low","enable_thinking":true,"k":1})");
  EXPECT_TRUE(call.chat.continue_final_message);
  EXPECT_EQ(call.last_role, "assistant");
}

TEST(OpenAiTest, TemplateVariablesOfTheRequestWinOverThoseOfTheServer) {
  ApiOptions options = Options();
  options.default_chat_template_kwargs = R"({"enable_thinking":true,"a":1,"b":2})";
  const CallRules rules{options, 1000};
  const auto kwargs = [&](const std::string& fields) {
    const auto body = ParseBody(R"({"messages":[{"role":"user","content":"x"}])" + fields + "}");
    return ParseChatCall(*body, rules).value().chat.kwargs;
  };
  EXPECT_EQ(kwargs(""), R"({"enable_thinking":true,"a":1,"b":2})");
  EXPECT_EQ(kwargs(R"(,"reasoning_effort":"none","chat_template_kwargs":{"a":3})"),
            R"({"b":2,"reasoning_effort":"none","enable_thinking":false,"a":3})");
  EXPECT_EQ(kwargs(R"(,"reasoning_effort":"none","chat_template_kwargs":{"enable_thinking":7})"),
            R"({"a":1,"b":2,"reasoning_effort":"none","enable_thinking":7})");
}

TEST(OpenAiTest, ChatRules) {
  const std::string type = "Bad Request";
  ExpectRefusals(Chat, {{"\"continue_final_message\":true", "continue_final_message", "both", type},
                        {"\"top_logprobs\":2", "top_logprobs", "`logprobs` must be set to true", type},
                        {"\"top_logprobs\":21,\"logprobs\":true", "top_logprobs", "max allowed: 20"},
                        {"\"logprobs\":1", "body.logprobs", "valid boolean", type},
                        {"\"reasoning_effort\":\"x\"", "reasoning_effort", "must be", type},
                        {"\"max_completion_tokens\":0", "max_completion_tokens", "at least 1"}});
  EXPECT_EQ(Chat("\"max_tokens\":5,\"max_completion_tokens\":7").value().max_tokens, 7);
  const auto logprobs = Chat("\"logprobs\":true").value();
  EXPECT_EQ(logprobs.sampling.num_logprobs, 0);
  for (const char* messages :
       {"null", "1", "[]", "[1]", "[{}]", "[{\"role\":1}]", "[{\"role\":\"user\",\"content\":1}]",
        "[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\",\"image_url\":{}}]}]",
        "[{\"role\":\"user\",\"content\":[{\"type\":\"text\"}]}]"}) {
    EXPECT_FALSE(Parse(CallKind::kChat, Format("{{\"messages\":{}}}", messages))) << messages;
  }
}

TEST(OpenAiTest, BodiesThatAreNoObjects) {
  for (const char* body : {"", "[]", "1", "{\"a\":1,\"a\":2}", "{\"a\":NaN}"}) {
    const auto value = ParseBody(body);
    ASSERT_FALSE(value) << body;
    EXPECT_EQ(value.error().type, "Bad Request");
    EXPECT_EQ(value.error().message.find("1 validation error:"), 0U);
  }
}

TEST(OpenAiTest, ErrorShape) {
  EXPECT_EQ(ErrorBody({.status = 404, .type = "NotFoundError", .message = "a\"b", .param = "model"}),
            R"({"error":{"message":"a\"b","type":"NotFoundError","param":"model","code":404}})");
  EXPECT_EQ(ErrorBody({.message = "x"}),
            R"({"error":{"message":"x","type":"BadRequestError","param":null,"code":400}})");
}

TEST(OpenAiTest, TokenizeForms) {
  const CallRules rules{Options(), 1000};
  const auto parse = [&](std::string_view text) { return ParseTokenizeCall(*ParseBody(text), rules); };
  EXPECT_EQ(parse(R"({"prompt":"a"})")->prompt, "a");
  EXPECT_TRUE(parse(R"({"prompt":"a"})")->add_special_tokens);
  EXPECT_TRUE(parse(R"({"messages":[{"role":"user","content":"a"}]})")->is_chat);
  EXPECT_FALSE(parse("{}"));
  EXPECT_FALSE(parse(R"({"prompt":1})"));
  const auto ids = [&](std::string_view text) { return ParseDetokenizeCall(*ParseBody(text), rules); };
  EXPECT_EQ(*ids(R"({"tokens":[1,9223372036854775807]})"), (std::vector<int32_t>{1, -1}));
  EXPECT_FALSE(ids(R"({"tokens":[-1]})"));
  EXPECT_FALSE(ids(R"({"tokens":[9223372036854775808]})"));
  EXPECT_FALSE(ids("{}"));
}

}  // namespace
}  // namespace tessera
