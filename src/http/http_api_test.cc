// The API from the wire to the engine and back: answers, streams, errors, connections. Scripted tokens, no
// model.
#include <gtest/gtest.h>

#include <algorithm>
#include <thread>

#include "http/scripted_world.h"

namespace tessera {
namespace {

using test::Events;
using test::ScriptedWorld;
using test::Wire;
using test::WireResponse;

// A member of a JSON text, by path; "missing" where there is none.
std::string At(const std::string& text, std::initializer_list<std::string_view> path) {
  const auto root = ParseJson(text);
  if (!root) return "no JSON: " + text;
  const JsonValue* value = &*root;
  for (const std::string_view step : path) {
    if (const JsonArray* array = value->AsArray()) {
      const size_t index = std::stoul(std::string(step));
      value = index < array->size() ? &(*array)[index] : nullptr;
    } else {
      value = value->Find(step);
    }
    if (!value) return "missing";
  }
  if (const std::string* plain = value->AsString()) return *plain;
  std::string out;
  AppendJson(out, *value);
  return out;
}

TEST(HttpApiTest, CompletionNotStreamed) {
  ScriptedWorld world;
  world.executor().SetScript(5, world.Ids("one two three"));
  const WireResponse answer = world.Post("/v1/completions", R"({"prompt":[5,6,7],"max_tokens":2,"seed":5})");
  ASSERT_EQ(answer.status, 200) << answer.body;
  EXPECT_EQ(At(answer.body, {"object"}), "text_completion");
  EXPECT_EQ(At(answer.body, {"model"}), "tiny");
  EXPECT_EQ(At(answer.body, {"id"}).substr(0, 5), "cmpl-");
  EXPECT_EQ(At(answer.body, {"choices", "0", "finish_reason"}), "length");
  EXPECT_EQ(At(answer.body, {"choices", "0", "stop_reason"}), "null");
  EXPECT_EQ(At(answer.body, {"choices", "0", "logprobs"}), "null");
  EXPECT_EQ(At(answer.body, {"usage"}), R"({"prompt_tokens":3,"total_tokens":5,"completion_tokens":2})");
  const auto ids = world.Ids("one two three");
  EXPECT_EQ(At(answer.body, {"choices", "0", "text"}),
            world.tokenizer().Decode(std::span(ids).first(2), true));
}

TEST(HttpApiTest, StreamJoinsToTheWholeAnswer) {
  ScriptedWorld world;
  world.executor().SetScript(1, world.Ids("Grüße, 世界! one two"));
  const size_t count = world.Ids("Grüße, 世界! one two").size();
  for (const char* path : {"/v1/completions", "/v1/chat/completions"}) {
    const bool chat = std::string_view(path).find("chat") != std::string_view::npos;
    const std::string prompt = chat ? R"("messages":[{"role":"user","content":"hi"}])" : R"("prompt":"hi")";
    const WireResponse answer = world.Post(
        path,
        Format(R"({{{},"max_tokens":{},"seed":1,"stream":true,"stream_options":{{"include_usage":true}}}})",
               prompt, count));
    world.executor().SetScript(1, world.Ids("Grüße, 世界! one two"));
    ASSERT_EQ(answer.status, 200) << answer.body;
    EXPECT_NE(answer.head.find("Content-Type: text/event-stream; charset=utf-8"), std::string::npos);
    const auto events = Events(answer.body);
    ASSERT_GE(events.size(), 4U);
    EXPECT_EQ(events.back(), "[DONE]");
    std::string text;
    int num_usage = 0, num_finish = 0;
    for (size_t i = 0; i + 1 < events.size(); ++i) {
      num_usage += At(events[i], {"usage"}) != "missing";
      if (At(events[i], {"choices"}) == "[]") continue;
      const std::string piece = chat ? At(events[i], {"choices", "0", "delta", "content"})
                                     : At(events[i], {"choices", "0", "text"});
      if (piece != "missing") text += piece;
      num_finish += At(events[i], {"choices", "0", "finish_reason"}) == "length";
    }
    EXPECT_EQ(text, "Grüße, 世界! one two");
    EXPECT_EQ(num_usage, 1);
    EXPECT_EQ(num_finish, 1);
    if (chat) {
      EXPECT_EQ(At(events[0], {"choices", "0", "delta"}), R"({"role":"assistant","content":""})");
    }
    EXPECT_EQ(At(events[events.size() - 2], {"usage", "completion_tokens"}), std::to_string(count));
    EXPECT_EQ(At(events[events.size() - 2], {"choices"}), "[]");
    // The second call of the loop continues the script from its start.
    world.executor().SetScript(1, world.Ids("Grüße, 世界! one two"));
  }
}

TEST(HttpApiTest, SeveralPromptsAndChoicesKeepTheirOrder) {
  ScriptedWorld world;
  const WireResponse answer =
      world.Post("/v1/completions",
                 R"({"prompt":[[5],[6,7]],"n":2,"max_tokens":1,"temperature":1,"return_token_ids":true})");
  ASSERT_EQ(answer.status, 200) << answer.body;
  for (const char* index : {"0", "1", "2", "3"}) {
    EXPECT_EQ(At(answer.body, {"choices", index, "index"}), index);
    EXPECT_EQ(At(answer.body, {"choices", index, "prompt_token_ids"}), *index < '2' ? "[5]" : "[6,7]");
  }
  EXPECT_EQ(At(answer.body, {"choices", "4"}), "missing");
  EXPECT_EQ(At(answer.body, {"usage", "prompt_tokens"}), "3");
  EXPECT_EQ(At(answer.body, {"usage", "completion_tokens"}), "4");
}

TEST(HttpApiTest, ReasoningIsToldApart) {
  ApiOptions options;
  options.reasoning_parser = true;
  ScriptedWorld world(options);
  auto script = world.Ids("thought</think>answer");
  script.push_back(*world.tokenizer().eos_id());
  for (uint64_t seed = 1; seed <= 3; ++seed) world.executor().SetScript(seed, script);
  const std::string body = R"({"messages":[{"role":"user","content":"hi"}],"seed":)";
  const WireResponse whole = world.Post("/v1/chat/completions", body + "1}");
  ASSERT_EQ(whole.status, 200) << whole.body;
  EXPECT_EQ(At(whole.body, {"choices", "0", "message", "reasoning"}), "thought");
  EXPECT_EQ(At(whole.body, {"choices", "0", "message", "reasoning_content"}), "thought");
  EXPECT_EQ(At(whole.body, {"choices", "0", "message", "content"}), "answer");
  EXPECT_EQ(At(whole.body, {"choices", "0", "finish_reason"}), "stop");
  EXPECT_EQ(At(whole.body, {"usage", "completion_tokens"}), std::to_string(script.size()));
  EXPECT_NE(At(whole.body, {"usage", "completion_tokens_details", "reasoning_tokens"}), "0");
  const WireResponse stream = world.Post("/v1/chat/completions", body + "2,\"stream\":true}");
  std::string reasoning, content;
  for (const std::string& event : Events(stream.body)) {
    const std::string thought = At(event, {"choices", "0", "delta", "reasoning"});
    if (thought == "missing" || event == "[DONE]") {
      const std::string piece = At(event, {"choices", "0", "delta", "content"});
      if (event != "[DONE]" && piece != "missing") content += piece;
      continue;
    }
    EXPECT_EQ(thought, At(event, {"choices", "0", "delta", "reasoning_content"}));
    reasoning += thought;
  }
  EXPECT_EQ(reasoning, "thought");
  EXPECT_EQ(content, "answer");
  const WireResponse hidden = world.Post("/v1/chat/completions", body + "3,\"include_reasoning\":false}");
  EXPECT_EQ(At(hidden.body, {"choices", "0", "message", "reasoning"}), "null");
  EXPECT_EQ(At(hidden.body, {"choices", "0", "message", "content"}), "answer");
}

TEST(HttpApiTest, StopStringEndsTheSequenceInTheEngine) {
  ScriptedWorld world({}, 100000, 13000);
  world.executor().SetScript(1, world.Ids("alpha beta STOP gamma "));
  const WireResponse answer =
      world.Post("/v1/completions", R"({"prompt":"hi","max_tokens":99000,"seed":1,"stop":"STOP"})");
  ASSERT_EQ(answer.status, 200) << answer.body;
  EXPECT_EQ(At(answer.body, {"choices", "0", "text"}), "alpha beta ");
  EXPECT_EQ(At(answer.body, {"choices", "0", "finish_reason"}), "stop");
  EXPECT_EQ(At(answer.body, {"choices", "0", "stop_reason"}), "STOP");
  EXPECT_TRUE(world.BecomesEmpty());
  EXPECT_LT(world.engine().Stats().generation_tokens, 90000U);
}

TEST(HttpApiTest, StopTokenAndEosHaveNoText) {
  ScriptedWorld world;
  auto script = world.Ids("alpha beta");
  const int32_t last = 700;
  ASSERT_EQ(std::count(script.begin(), script.end(), last), 0);
  script.push_back(last);
  world.executor().SetScript(1, script);
  const WireResponse answer =
      world.Post("/v1/completions", Format(R"({{"prompt":"hi","max_tokens":50,"seed":1,"stop_token_ids":[{}],
                                               "return_token_ids":true}})",
                                           last));
  EXPECT_EQ(At(answer.body, {"choices", "0", "stop_reason"}), std::to_string(last));
  EXPECT_EQ(At(answer.body, {"usage", "completion_tokens"}), std::to_string(script.size()));
  EXPECT_NE(At(answer.body, {"choices", "0", "token_ids"}).find(std::to_string(last) + "]"),
            std::string::npos);
  script.pop_back();
  EXPECT_EQ(At(answer.body, {"choices", "0", "text"}), world.tokenizer().Decode(script, true));
}

TEST(HttpApiTest, EchoWithLogprobs) {
  ScriptedWorld world;
  world.executor().SetScript(1, {300});
  const WireResponse answer =
      world.Post("/v1/completions",
                 R"({"prompt":[0,301,302],"max_tokens":1,"seed":1,"echo":true,"logprobs":1,
          "return_tokens_as_token_ids":true})");
  ASSERT_EQ(answer.status, 200) << answer.body;
  EXPECT_EQ(At(answer.body, {"choices", "0", "logprobs", "tokens"}),
            R"(["token_id:0","token_id:301","token_id:302","token_id:300"])");
  EXPECT_EQ(At(answer.body, {"choices", "0", "logprobs", "token_logprobs"}), "[null,-0.725,-0.85,-0.6]");
  EXPECT_EQ(
      At(answer.body, {"choices", "0", "logprobs", "top_logprobs"}),
      R"([null,{"token_id:300":-0.25,"token_id:301":-0.725},{"token_id:300":-0.25,"token_id:302":-0.85},)"
      R"({"token_id:300":-0.25}])");
  // The BOS is a token, but no text.
  EXPECT_EQ(At(answer.body, {"choices", "0", "text"}),
            world.tokenizer().Decode(std::vector<int32_t>{301, 302, 300}, true));
  EXPECT_EQ(At(answer.body, {"choices", "0", "logprobs", "text_offset"}).substr(0, 4), "[0,0");
  const WireResponse alone =
      world.Post("/v1/completions", R"({"prompt":[301,302],"max_tokens":0,"echo":true,"logprobs":0})");
  ASSERT_EQ(alone.status, 200) << alone.body;
  EXPECT_EQ(At(alone.body, {"usage", "completion_tokens"}), "0");
  EXPECT_EQ(At(alone.body, {"choices", "0", "logprobs", "token_logprobs"}), "[null,-0.85]");
  EXPECT_EQ(At(alone.body, {"choices", "0", "finish_reason"}), "length");
  const WireResponse special = world.Post(
      "/v1/completions", R"({"prompt":[0],"max_tokens":0,"echo":true,"skip_special_tokens":false})");
  EXPECT_EQ(At(special.body, {"choices", "0", "text"}), world.tokenizer().bos_token());
}

TEST(HttpApiTest, ChatLogprobsHoldBytes) {
  ScriptedWorld world;
  world.executor().SetScript(1, world.Ids("a"));
  const WireResponse answer =
      world.Post("/v1/chat/completions",
                 R"({"messages":[{"role":"user","content":"x"}],"max_tokens":1,"seed":1,"logprobs":true,
          "top_logprobs":2})");
  ASSERT_EQ(answer.status, 200) << answer.body;
  const auto entry = [&](std::string_view key) {
    return At(answer.body, {"choices", "0", "logprobs", "content", "0", key});
  };
  EXPECT_EQ(entry("token"), "a");
  EXPECT_EQ(entry("bytes"), "[97]");
  EXPECT_EQ(At(answer.body, {"choices", "0", "logprobs", "content", "0", "top_logprobs", "1", "logprob"}),
            "-0.75");
  EXPECT_EQ(At(answer.body, {"choices", "0", "logprobs", "content", "0", "top_logprobs", "2"}), "missing");
}

TEST(HttpApiTest, PromptLogprobs) {
  ScriptedWorld world;
  const WireResponse answer =
      world.Post("/v1/completions", R"({"prompt":[301,302],"max_tokens":1,"prompt_logprobs":1})");
  ASSERT_EQ(answer.status, 200) << answer.body;
  const std::string rows = At(answer.body, {"choices", "0", "prompt_logprobs"});
  EXPECT_EQ(At(rows, {"0"}), "null");
  EXPECT_EQ(At(rows, {"1", "300", "rank"}), "1");
  EXPECT_EQ(At(rows, {"1", "302", "logprob"}), "-0.85");
}

TEST(HttpApiTest, LengthErrors) {
  ScriptedWorld world({}, 32);
  std::string ids = "[5";
  for (int i = 1; i < 32; ++i) ids += ",5";
  const WireResponse full = world.Post("/v1/completions", "{\"max_tokens\":1,\"prompt\":" + ids + "]}");
  EXPECT_EQ(full.status, 400);
  EXPECT_EQ(At(full.body, {"error", "param"}), "input_tokens");
  EXPECT_NE(full.body.find("maximum context length is"), std::string::npos);
  const WireResponse large = world.Post("/v1/completions", R"({"prompt":[5,6],"max_tokens":31})");
  EXPECT_EQ(At(large.body, {"error", "param"}), "max_tokens");
  EXPECT_NE(large.body.find("is too large"), std::string::npos);
  EXPECT_EQ(world.Post("/v1/completions", R"({"prompt":[5,6],"max_tokens":30})").status, 200);
  const WireResponse text =
      world.Post("/v1/completions", "{\"prompt\":\"" + std::string(1 << 20, 'a') + "\"}");
  EXPECT_EQ(At(text.body, {"error", "param"}), "input_tokens");
  // Chat without max_tokens gets the room that is left.
  const WireResponse chat =
      world.Post("/v1/chat/completions", R"({"messages":[{"role":"user","content":"x"}]})");
  EXPECT_EQ(At(chat.body, {"choices", "0", "finish_reason"}), "length") << chat.body;
  EXPECT_EQ(At(chat.body, {"usage", "total_tokens"}), "32");
}

TEST(HttpApiTest, SmallEndpoints) {
  ApiOptions options;
  options.model_root = "models/tiny";
  options.enable_tokenizer_info_endpoint = true;
  ScriptedWorld world(options);
  const WireResponse health = world.Get("/health");
  EXPECT_EQ(health.status, 200);
  EXPECT_EQ(health.body, "");
  EXPECT_EQ(world.Get("/ping").status, 200);
  EXPECT_EQ(world.Get("/ready").status, 200);
  EXPECT_EQ(At(world.Get("/version").body, {"version"}), "1.2.3");
  EXPECT_EQ(At(world.Get("/load").body, {"server_load"}), "0");
  const WireResponse models = world.Get("/v1/models");
  EXPECT_EQ(At(models.body, {"data", "1", "id"}), "alias");
  EXPECT_EQ(At(models.body, {"data", "0", "root"}), "models/tiny");
  EXPECT_EQ(At(models.body, {"data", "0", "max_model_len"}), "256");
  const WireResponse tokens = world.Post("/tokenize", R"({"prompt":"hello","return_token_strs":true})");
  const std::string ids = At(tokens.body, {"tokens"});
  EXPECT_EQ(ids.substr(0, 3), "[0,");  // BOS
  EXPECT_EQ(At(tokens.body, {"token_strs", "0"}), world.tokenizer().bos_token());
  const WireResponse text = world.Post("/detokenize", "{\"tokens\":" + ids + "}");
  EXPECT_EQ(At(text.body, {"prompt"}), world.tokenizer().bos_token() + "hello");
  const WireResponse chat = world.Post("/tokenize", R"({"messages":[{"role":"user","content":"hello"}]})");
  EXPECT_NE(At(chat.body, {"count"}), "missing") << chat.body;
  EXPECT_EQ(At(world.Get("/tokenizer_info").body, {"bos_token"}), world.tokenizer().bos_token());
}

TEST(HttpApiTest, RoutesMethodsAndContentTypes) {
  ScriptedWorld world;
  const WireResponse unknown = world.Get("/v1/nothing");
  EXPECT_EQ(unknown.status, 404);
  EXPECT_EQ(At(unknown.body, {"error", "type"}), "NotFoundError");
  const WireResponse method = world.Get("/v1/completions");
  EXPECT_EQ(method.status, 405);
  EXPECT_NE(method.head.find("Allow: POST\r\n"), std::string::npos);
  EXPECT_EQ(At(method.body, {"error", "code"}), "405");
  Wire wire(world.port());
  wire.Send(
      "POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}");
  EXPECT_EQ(wire.Read().status, 400);
  wire.Send(
      "POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json; charset=utf-8\r\n"
      "Content-Length: 2\r\n\r\n{}");
  EXPECT_NE(wire.Read().body.find("Field required"), std::string::npos);  // and the connection was kept
}

TEST(HttpApiTest, ApiKeys) {
  ApiOptions options;
  options.api_keys = {"one", "two"};
  ScriptedWorld world(options);
  EXPECT_EQ(world.Get("/health").status, 200);
  EXPECT_EQ(world.Get("/metrics").status, 200);
  for (const char* path : {"/v1/models", "/version", "/nothing", "/v1/completions"}) {
    const WireResponse refused = world.Get(path);
    EXPECT_EQ(refused.status, 401) << path;
    EXPECT_EQ(At(refused.body, {"error", "type"}), "AuthenticationError");
    EXPECT_NE(refused.body.find("Unauthorized"), std::string::npos);
  }
  EXPECT_EQ(world.Get("/v1/models", "Authorization: bEaReR two\r\n").status, 200);
  for (const char* header : {"Bearer three", "Bearer", "Bearer ", "Basic one", "one", "Bearer one two"}) {
    EXPECT_EQ(world.Get("/v1/models", Format("Authorization: {}\r\n", header)).status, 401) << header;
  }
}

TEST(HttpApiTest, ConnectionsLiveOnAndPipeline) {
  ScriptedWorld world;
  Wire wire(world.port());
  const std::string post = ScriptedWorld::PostText("/v1/completions", R"({"prompt":"hi","max_tokens":1})");
  wire.Send(post + "GET /version HTTP/1.1\r\nHost: t\r\n\r\n" + post +
            "GET /health HTTP/1.1\r\nHost: t\r\n\r\n");
  EXPECT_EQ(At(wire.Read().body, {"object"}), "text_completion");
  EXPECT_EQ(At(wire.Read().body, {"version"}), "1.2.3");
  EXPECT_EQ(At(wire.Read().body, {"object"}), "text_completion");
  EXPECT_EQ(wire.Read().status, 200);
  wire.Send("GET /health HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n");
  EXPECT_NE(wire.Read().head.find("Connection: close"), std::string::npos);
  EXPECT_TRUE(wire.AtEnd());
}

TEST(HttpApiTest, OldHttpAndExpectations) {
  ScriptedWorld world;
  Wire old(world.port());
  const std::string body = R"({"prompt":"hi","max_tokens":3,"stream":true})";
  old.Send(Format(
      "POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{}",
      body.size(), body));
  const WireResponse stream = old.Read();  // until the connection ends
  EXPECT_EQ(stream.head.find("Transfer-Encoding"), std::string::npos);
  EXPECT_EQ(Events(stream.body).back(), "[DONE]");
  Wire patient(world.port());
  patient.Send(
      "POST /tokenize HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: 14\r\n"
      "Expect: 100-continue\r\n\r\n");
  EXPECT_EQ(patient.Read().status, 100);
  patient.Send(R"({"prompt":"a"})");
  EXPECT_EQ(patient.Read().status, 200);
}

TEST(HttpApiTest, TooLargeAndMalformedRequestsEndTheConnection) {
  ApiOptions options;
  options.max_body_bytes = 1 << 20;
  ScriptedWorld world(options);
  Wire large(world.port());
  large.Send(
      "POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
      "Content-Length: 1048577\r\n\r\n");
  EXPECT_EQ(large.Read().status, 413);
  EXPECT_TRUE(large.AtEnd());
  Wire smuggler(world.port());
  smuggler.Send(
      "POST /health HTTP/1.1\r\nHost: t\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n");
  const WireResponse refused = smuggler.Read();
  EXPECT_EQ(refused.status, 400);
  EXPECT_EQ(At(refused.body, {"error", "code"}), "400");
  EXPECT_TRUE(smuggler.AtEnd());
  Wire fields(world.port());
  fields.Send("GET /health HTTP/1.1\r\nHost: t\r\nX: " + std::string(70000, 'x') + "\r\n\r\n");
  EXPECT_EQ(fields.Read().status, 431);
  // A refused request with a body that is worth reading keeps its connection, a longer one does not.
  Wire keeps(world.port());
  keeps.Send("POST /nothing HTTP/1.1\r\nHost: t\r\nContent-Length: 3\r\n\r\nabc");
  EXPECT_EQ(keeps.Read().status, 404);
  keeps.Send("POST /nothing HTTP/1.1\r\nHost: t\r\nContent-Length: 100000\r\n\r\n");
  EXPECT_EQ(keeps.Read().status, 404);
  EXPECT_TRUE(keeps.AtEnd());
}

TEST(HttpApiTest, AClientThatLeavesFreesItsBlocks) {
  ScriptedWorld world;
  for (const char* stream : {"true", "false"}) {
    world.executor().Hold();
    Wire wire(world.port());
    wire.Send(ScriptedWorld::PostText(
        "/v1/completions",
        Format(R"({{"prompt":"hi","max_tokens":200,"n":4,"temperature":1,"stream":{}}})", stream)));
    world.executor().WaitForRun();
    wire.Close();
    world.executor().Release();
    EXPECT_TRUE(world.BecomesEmpty()) << stream;
  }
  // Far fewer than the 1600 tokens that were asked for.
  EXPECT_EQ(world.Get("/health").status, 200);
}

TEST(HttpApiTest, ASlowReaderIsWaitedForAndMissesNothing) {
  ScriptedWorld world({}, 4096, 600);
  Wire wire(world.port(), 4096);
  wire.Send(ScriptedWorld::PostText(
      "/v1/completions", R"({"prompt":[5],"max_tokens":4000,"stream":true,"logprobs":20,"seed":0})"));
  ASSERT_TRUE(wire.ReadUntil("data: "));
  ASSERT_TRUE(world.BecomesEmpty());  // the engine does not wait for the client
  // Others are served meanwhile.
  EXPECT_EQ(world.Post("/v1/completions", R"({"prompt":"hi","max_tokens":2})").status, 200);
  const WireResponse answer = wire.Read();
  EXPECT_TRUE(answer.complete);
  const auto events = Events(answer.body);
  EXPECT_EQ(events.size(), 4001U);
  EXPECT_EQ(events.back(), "[DONE]");
}

TEST(HttpApiTest, AFullQueueIsRefusedEarly) {
  ScriptedWorld world({}, 256, 256, 2);
  world.executor().Hold();
  std::vector<std::unique_ptr<Wire>> wires;
  const std::string post = ScriptedWorld::PostText("/v1/completions", R"({"prompt":"hi","max_tokens":4})");
  wires.push_back(std::make_unique<Wire>(world.port()));
  wires.back()->Send(post);
  world.executor().WaitForRun();
  // One connection: its requests are answered in order, so it waits; another one is needed for each.
  for (int i = 0; i < 2; ++i) {
    wires.push_back(std::make_unique<Wire>(world.port()));
    wires.back()->Send(post);
    while (world.engine().Stats().num_waiting <= i) std::this_thread::yield();
  }
  const WireResponse refused = world.Post("/v1/completions", R"({"prompt":"hi","max_tokens":4})");
  EXPECT_EQ(refused.status, 429);
  EXPECT_EQ(At(refused.body, {"error", "type"}), "ServiceUnavailableError");
  EXPECT_NE(refused.head.find("Retry-After: "), std::string::npos);
  world.executor().Release();
  for (auto& wire : wires) EXPECT_EQ(wire->Read().status, 200);
}

TEST(HttpApiTest, ErrorsBeforeAndAfterTheFirstByte) {
  ScriptedWorld world;
  world.executor().FailAfter(1);
  const WireResponse before = world.Post("/v1/completions", R"({"prompt":"hi","stream":true})");
  EXPECT_EQ(before.status, 500);
  EXPECT_EQ(At(before.body, {"error", "type"}), "InternalServerError");
  world.executor().FailAfter(3);
  const WireResponse after = world.Post("/v1/completions", R"({"prompt":"hi","stream":true})");
  EXPECT_EQ(after.status, 200);
  const auto events = Events(after.body);
  ASSERT_GE(events.size(), 3U);
  EXPECT_EQ(At(events[events.size() - 2], {"error", "code"}), "500");
  EXPECT_EQ(events.back(), "[DONE]");
  world.executor().FailAfter(2);
  EXPECT_EQ(world.Post("/v1/completions", R"({"prompt":"hi"})").status, 500);
  EXPECT_EQ(world.Post("/v1/completions", R"({"prompt":"hi","max_tokens":2})").status, 200);
}

TEST(HttpApiTest, DrainRefusesNewAndFinishesOld) {
  ScriptedWorld world;
  world.executor().Hold();
  Wire running(world.port());
  running.Send(ScriptedWorld::PostText("/v1/completions", R"({"prompt":"hi","max_tokens":5})"));
  world.executor().WaitForRun();
  world.server().BeginDrain();
  EXPECT_EQ(world.Get("/ready").status, 503);
  EXPECT_EQ(world.Get("/health").status, 200);
  const WireResponse refused = world.Post("/v1/completions", R"({"prompt":"hi"})");
  EXPECT_EQ(refused.status, 503);
  EXPECT_NE(refused.head.find("Retry-After: "), std::string::npos);
  world.executor().Release();
  world.server().Stop(std::chrono::seconds(20));
  EXPECT_EQ(running.Read().status, 200);
  EXPECT_FALSE(Wire(world.port()).connected());
}

TEST(HttpApiTest, AbortAtShutdownIsAnError) {
  ScriptedWorld world({}, 100000, 13000);
  world.executor().Hold();
  Wire running(world.port());
  running.Send(ScriptedWorld::PostText("/v1/completions", R"({"prompt":"hi","max_tokens":99000})"));
  world.executor().WaitForRun();
  std::thread drain([&] { world.engine().Drain(std::chrono::nanoseconds(0)); });
  // Until the engine refuses others, it has not begun to shut down.
  auto probe = std::make_shared<Request>();
  probe->id = "probe";
  probe->prompt = {5};
  while (world.engine().Submit(probe, std::make_shared<Outbox>(nullptr))) world.engine().Cancel("probe");
  world.executor().Release();
  const WireResponse answer = running.Read();
  drain.join();
  EXPECT_EQ(answer.status, 503);
  EXPECT_EQ(At(answer.body, {"error", "type"}), "ServiceUnavailableError");
}

TEST(HttpApiTest, RequestIds) {
  ApiOptions options;
  options.enable_request_id_headers = true;
  ScriptedWorld world(options);
  const WireResponse named = world.Post(
      "/v1/completions", R"({"prompt":"hi","max_tokens":1,"request_id":"b"})", "X-Request-Id: h\r\n");
  EXPECT_EQ(At(named.body, {"id"}), "cmpl-h");
  EXPECT_NE(named.head.find("X-Request-Id: h\r\n"), std::string::npos);
  EXPECT_EQ(
      At(world.Post("/v1/completions", R"({"prompt":"hi","max_tokens":1,"request_id":"b"})").body, {"id"}),
      "cmpl-b");
  const WireResponse injected =
      world.Post("/v1/completions", R"({"prompt":"hi","max_tokens":1,"request_id":"a\r\nX: y"})");
  EXPECT_EQ(injected.head.find("X: y"), std::string::npos);
}

TEST(HttpApiTest, MetricsCountRequestsAndTokens) {
  ScriptedWorld world;
  for (int i = 0; i < 10; ++i) {
    ASSERT_EQ(
        world.Post("/v1/completions", Format(R"({{"prompt":[{},6,7],"max_tokens":10}})", 300 + i)).status,
        200);
  }
  const std::string text = world.Get("/metrics").body;
  const std::string labels = "{engine=\"0\",model_name=\"tiny\"} ";
  for (const std::string& line :
       {"vllm:time_to_first_token_seconds_count" + labels + "10.0",
        "vllm:inter_token_latency_seconds_count" + labels + "90.0",
        "vllm:time_per_output_token_seconds_count" + labels + "90.0",
        "vllm:iteration_tokens_total_count" + labels + "100.0",
        "vllm:iteration_tokens_total_sum" + labels + "130.0", "vllm:prompt_tokens_total" + labels + "30.0",
        "vllm:generation_tokens_total" + labels + "100.0", "vllm:num_requests_running" + labels + "0.0",
        "vllm:kv_cache_usage_perc" + labels + "0.0", "vllm:gpu_cache_usage_perc" + labels + "0.0"}) {
    EXPECT_NE(text.find("\n" + line + "\n"), std::string::npos) << line << "\n" << text;
  }
  for (const char* part :
       {"vllm:request_success_total{engine=\"0\",finished_reason=\"length\",model_name=\"tiny\"} 10.0\n",
        "vllm:request_success_total{engine=\"0\",finished_reason=\"abort\",model_name=\"tiny\"} 0.0\n",
        "http_requests_total{handler=\"/v1/completions\",method=\"POST\",status=\"2xx\"} 10.0\n",
        "vllm:time_to_first_token_seconds_bucket{engine=\"0\",model_name=\"tiny\",le=\"+Inf\"} 10.0\n",
        "block_size=\"8\"", "process_resident_memory_bytes "}) {
    EXPECT_NE(text.find(part), std::string::npos) << part << "\n" << text;
  }
}

}  // namespace
}  // namespace tessera
