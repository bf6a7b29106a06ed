// For the Python tests of this folder: JSON lines in, JSON lines out, one answer per line, in order.
//   encode_tool FOLDER
//   {"encode": "text", "control": true|false}  -> {"ids": [...]}
//   {"prompt": "text", "special": true|false}  -> {"ids": [...]}        (the rule of raw prompts)
//   {"decode": [ids], "skip": true|false}      -> {"text": "...", "streamed": "..."}
//   {"chat": {"messages": [...], "tools": ..., "kwargs": {...}, "generate": bool, "continue": bool}}
//                                              -> {"text": "...", "ids": [...]}
// An error of the room is {"error": "..."}. A line that it cannot read ends it with exit code 2.
#include <iostream>
#include <nlohmann/json.hpp>

#include "text/chat_template.h"
#include "text/detokenizer.h"
#include "text/tokenizer.h"

namespace tessera {
namespace {

using Json = nlohmann::ordered_json;

Json Ids(const Result<TokenIds>& ids) {
  if (!ids) return {{"error", ids.error().message}};
  return {{"ids", *ids}};
}

Json Decode(const Tokenizer& tokenizer, const Json& line) {
  const TokenIds ids = line["decode"].get<TokenIds>();
  const bool skip = line.value("skip", false);
  Detokenizer detokenizer(tokenizer, {.strings = {}, .skip_special_tokens = skip});
  std::string streamed;
  for (const int32_t id : ids) streamed += detokenizer.Push(id);
  streamed += detokenizer.Finish();
  return {{"text", tokenizer.Decode(ids, skip)}, {"streamed", streamed}};
}

Json Chat(const ChatTemplate& chat_template, const Json& chat) {
  const auto rendered = chat_template.Render({.messages = chat["messages"].dump(),
                                              .tools = chat.value("tools", Json()).dump(),
                                              .kwargs = chat.value("kwargs", Json::object()).dump(),
                                              .add_generation_prompt = chat.value("generate", true),
                                              .continue_final_message = chat.value("continue", false)});
  if (!rendered) return {{"error", rendered.error().message}};
  return {{"text", rendered->text}, {"ids", rendered->ids}};
}

int Serve(const std::string& folder) {
  const auto tokenizer = Tokenizer::Load(folder);
  if (!tokenizer) return std::cerr << tokenizer.error().message << '\n', 1;
  const auto chat_template = ChatTemplate::Compile((*tokenizer)->chat_template(), **tokenizer);
  if (!chat_template) return std::cerr << chat_template.error().message << '\n', 1;
  for (std::string text; std::getline(std::cin, text);) {
    const Json line = Json::parse(text, nullptr, /*allow_exceptions=*/false);
    Json answer;
    if (line.contains("encode")) {
      const ControlTokens control =
          line.value("control", true) ? ControlTokens::kParse : ControlTokens::kText;
      answer = Ids((*tokenizer)->Encode(line["encode"].get<std::string>(), control));
    } else if (line.contains("prompt")) {
      answer =
          Ids((*tokenizer)->EncodePrompt(line["prompt"].get<std::string>(), line.value("special", true)));
    } else if (line.contains("decode")) {
      answer = Decode(**tokenizer, line);
    } else if (line.contains("chat")) {
      answer = Chat(**chat_template, line["chat"]);
    } else {
      return std::cerr << "cannot read: " << text << '\n', 2;
    }
    std::cout << answer.dump() << '\n';
  }
  return 0;
}

}  // namespace
}  // namespace tessera

int main(int argc, char** argv) {
  if (argc != 2) return std::cerr << "usage: encode_tool FOLDER < requests.jsonl\n", 2;
  return tessera::Serve(argv[1]);
}
