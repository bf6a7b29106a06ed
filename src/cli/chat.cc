// A conversation over /v1/chat/completions, thought dimmed on a terminal, and single texts over
// /v1/completions.
#include "cli/chat.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <optional>

#include "base/format.h"
#include "cli/flags.h"
#include "cli/http_client.h"
#include "cli/json.h"

namespace tessera::cli {
namespace {

struct TalkOptions {
  std::string url = "http://localhost:8000/v1";
  std::string model_name;
  std::vector<std::string> api_key;
  std::string system_prompt;
  std::string quick;
  std::optional<int64_t> max_tokens;
};

FlagTable TalkTable(TalkOptions& o, bool chat) {
  FlagTable table{.command = chat ? "tessera chat" : "tessera complete",
                  .summary = chat ? "Talks with a running server; an empty input (Ctrl-D) ends it."
                                  : "Completes each line of the input on a running server.",
                  .flags = {}};
  const char* group = "Flags";
  table.flags = {
      {"url", "", TextFlag{&o.url}, "the server's API", group},
      {"model-name", "", TextFlag{&o.model_name}, "empty: the server's first", group},
      {"api-key", "", ListFlag{&o.api_key}, "else VLLM_API_KEY or OPENAI_API_KEY", group},
      {"quick", "q", TextFlag{&o.quick}, "this one message, then end", group},
      {"max-tokens", "", OptionalIntFlag{&o.max_tokens, 1, INT32_MAX},
       "limit of an answer (default: the server's)", group},
  };
  if (chat)
    table.flags.push_back({"system-prompt", "", TextFlag{&o.system_prompt}, "the system message", group});
  return table;
}

// Server and model of one session.
struct Session {
  HttpConnection connection;
  std::vector<std::string> headers;
  std::string model;
};

std::string ErrorText(const HttpAnswer& answer) {
  return Format("the server answered {}: {}", answer.status,
                JsonString(answer.body, "/error/message").value_or(answer.body));
}

Result<Session> Open(const TalkOptions& o) {
  ASSIGN_OR_RETURN(Url url, ParseUrl(o.url));
  // A thought of a busy server may take minutes before its first token.
  Session session{HttpConnection(std::move(url), std::chrono::minutes(10)), {}, o.model_name};
  std::string key = o.api_key.empty() ? "" : o.api_key[0];
  for (const char* name : {"VLLM_API_KEY", "OPENAI_API_KEY"}) {
    if (const char* value = std::getenv(name); key.empty() && value != nullptr) key = value;
  }
  if (!key.empty()) session.headers.push_back("Authorization: Bearer " + key);
  if (session.model.empty()) {
    ASSIGN_OR_RETURN(const HttpAnswer answer, session.connection.Send("GET", "/models", session.headers, ""));
    const auto id = JsonString(answer.body, "/data/0/id");
    if (!id) return Fail(ErrorKind::kUnavailable, "{}", ErrorText(answer));
    session.model = *id;
  }
  return session;
}

// Sends a streaming request and hands every chunk to `chunk`.
Status Stream(Session& session, std::string_view path, const std::string& body,
              const std::function<void(std::string_view)>& chunk) {
  SseReader events;
  std::string error;
  ASSIGN_OR_RETURN(const HttpAnswer answer,
                   session.connection.Send("POST", path, session.headers, body, [&](std::string_view bytes) {
                     return events.Push(bytes, [&](std::string_view data) {
                       if (data == "[DONE]") return true;
                       if (const auto text = JsonString(data, "/error/message"))
                         error = *text;
                       else
                         chunk(data);
                       return true;
                     });
                   }));
  if (answer.status != 200) return Fail(ErrorKind::kUnavailable, "{}", ErrorText(answer));
  if (!error.empty()) return Fail(ErrorKind::kUnavailable, "the server ended the answer: {}", error);
  return {};
}

std::string Limit(const TalkOptions& o) {
  return o.max_tokens ? Format(", \"max_tokens\": {}", *o.max_tokens) : "";
}

void Print(std::string_view text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
}

// One turn: prints the answer as it comes and gives its text (the thought is not kept in the history).
Result<std::string> Turn(Session& session, const TalkOptions& o, const std::string& messages) {
  const std::string body = Format("{{\"model\": {}, \"messages\": [{}], \"stream\": true{}}}",
                                  JsonQuote(session.model), messages, Limit(o));
  const bool colors = isatty(STDOUT_FILENO);
  std::string content;
  bool thinking = false;
  RETURN_IF_ERROR(Stream(session, "/chat/completions", body, [&](std::string_view chunk) {
    if (const auto thought = JsonString(chunk, "/choices/0/delta/reasoning"); thought && !thought->empty()) {
      if (!thinking && colors) Print("\033[2m");
      thinking = true;
      Print(*thought);
    }
    if (auto text = JsonString(chunk, "/choices/0/delta/content"); text && !text->empty()) {
      // Between thought and answer stands one empty line, whatever the model writes there.
      while (content.empty() && text->starts_with('\n')) text->erase(0, 1);
      if (text->empty()) return;
      if (thinking) Print(colors ? "\033[0m\n\n" : "\n\n");
      thinking = false;
      content += *text;
      Print(*text);
    }
  }));
  Print(thinking && colors ? "\033[0m\n" : "\n");
  return content;
}

Status Chat(const TalkOptions& o) {
  ASSIGN_OR_RETURN(Session session, Open(o));
  const auto message = [](std::string_view role, std::string_view text) {
    return Format("{{\"role\": \"{}\", \"content\": {}}}", role, JsonQuote(text));
  };
  std::string messages = o.system_prompt.empty() ? "" : message("system", o.system_prompt) + ", ";
  if (!o.quick.empty()) {
    ASSIGN_OR_RETURN(const std::string answer, Turn(session, o, messages + message("user", o.quick)));
    return {};
  }
  if (isatty(STDIN_FILENO)) fmt::print("{} at {}; Ctrl-D ends.\n", session.model, o.url);
  for (std::string line;;) {
    if (isatty(STDIN_FILENO)) Print("> ");
    if (!std::getline(std::cin, line)) return {};
    if (line.empty()) continue;
    messages += message("user", line);
    ASSIGN_OR_RETURN(const std::string answer, Turn(session, o, messages));
    messages += ", " + message("assistant", answer) + ", ";
  }
}

Status CompleteText(Session& session, const TalkOptions& o, const std::string& prompt) {
  const std::string body = Format("{{\"model\": {}, \"prompt\": {}, \"stream\": true{}}}",
                                  JsonQuote(session.model), JsonQuote(prompt), Limit(o));
  RETURN_IF_ERROR(Stream(session, "/completions", body, [](std::string_view chunk) {
    if (const auto text = JsonString(chunk, "/choices/0/text")) Print(*text);
  }));
  Print("\n");
  return {};
}

Status Complete(const TalkOptions& o) {
  ASSIGN_OR_RETURN(Session session, Open(o));
  if (!o.quick.empty()) return CompleteText(session, o, o.quick);
  for (std::string line;;) {
    if (isatty(STDIN_FILENO)) Print("> ");
    if (!std::getline(std::cin, line)) return {};
    if (!line.empty()) RETURN_IF_ERROR(CompleteText(session, o, line));
  }
}

int Run(std::span<const std::string> arguments, bool chat) {
  TalkOptions options;
  return RunCommand(TalkTable(options, chat), arguments,
                    [&](const ParsedFlags&) { return chat ? Chat(options) : Complete(options); });
}

}  // namespace

int RunChat(std::span<const std::string> arguments) {
  return Run(arguments, true);
}
int RunComplete(std::span<const std::string> arguments) {
  return Run(arguments, false);
}

}  // namespace tessera::cli
