// The bridge onto textkit's Jinja, and the rule that control tokens in messages stay text. Messages go into
// the template with a mark (a noncharacter that occurs nowhere in them) inside each control token they hold.
// What still reads as a control token in the rendered text was written by the template. Text between control
// tokens is encoded without marks by the tokenizer that knows no added tokens: exactly the ids of the plain
// text.
#include "text/chat_template.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "text/control_scanner.h"
#include "text/template_variables.h"
#include "text/textkit_bridge.h"

namespace tessera {
namespace {

// A template may take this many steps (of about one instruction or 64 bytes), and two more per byte of input:
// 102 messages of R1 take about 3,000, an endless loop ends in 20 ms.
constexpr uint64_t kMinSteps = 500'000;
constexpr uint64_t kStepsPerByte = 2;

constexpr std::string_view kBlanks = " \t\n\v\f\r";

// A noncharacter as UTF-8, and as JSON escapes it.
struct Mark {
  std::string bytes;
  std::string escape;
};

Mark NonCharacter(int index) {  // U+FDD0 + index, index < 32
  const int code = 0xFDD0 + index;
  return {.bytes = {static_cast<char>(0xE0 | code >> 12), static_cast<char>(0x80 | (code >> 6 & 0x3F)),
                    static_cast<char>(0x80 | (code & 0x3F))},
          .escape = Format("\\u{:04x}", code)};
}

bool ContainsIgnoringCase(std::string_view text, std::string_view lower_case) {
  const auto equal = [](char a, char b) { return (a >= 'A' && a <= 'Z' ? a + ('a' - 'A') : a) == b; };
  return std::ranges::search(text, lower_case, equal).begin() != text.end();
}

// The first two noncharacters that occur in none of `texts`, raw or escaped; fewer where there are not as
// many.
std::vector<Mark> FreeMarks(std::initializer_list<std::string_view> texts) {
  std::vector<Mark> free;
  for (int index = 0; index < 32 && free.size() < 2; ++index) {
    Mark mark = NonCharacter(index);
    const bool taken = std::ranges::any_of(texts, [&mark](std::string_view text) {
      return text.find(mark.bytes) != std::string_view::npos ||
             ContainsIgnoringCase(text, std::string_view(mark.escape).substr(1));
    });
    if (!taken) free.push_back(std::move(mark));
  }
  return free;
}

std::string_view Stripped(std::string_view text) {
  const size_t first = text.find_first_not_of(kBlanks);
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(kBlanks) - first + 1);
}

// `rendered` up to the end of the final message's content, which `tail_mark` and a blank follow.
Result<std::string> CutAtTail(std::string rendered, std::string_view final_content, const Mark& tail_mark) {
  const size_t at = rendered.rfind(tail_mark.bytes);
  if (at == std::string::npos || rendered.find(Stripped(final_content)) == std::string::npos) {
    return Invalid(
        "continue_final_message: the chat template does not write out the final message's content");
  }
  // A template that trims has also taken the blanks before the mark that the message had at its end.
  const bool trimmed =
      at + tail_mark.bytes.size() >= rendered.size() || rendered[at + tail_mark.bytes.size()] != ' ';
  rendered.resize(at);
  if (trimmed) rendered.resize(rendered.find_last_not_of(kBlanks) + 1);
  return rendered;
}

std::vector<std::string> WithoutThinking(const std::vector<std::string>& tokens) {
  std::vector<std::string> rest;
  std::ranges::copy_if(tokens, std::back_inserter(rest),
                       [](const std::string& token) { return token != "<think>" && token != "</think>"; });
  return rest;
}

}  // namespace

struct ChatTemplate::Content {
  struct Free {
    void operator()(tk_template* handle) const { tk_template_free(handle); }
  };
  Content(tk_template* handle, const Tokenizer& tokenizer, std::string_view source)
      : handle(handle),
        tokenizer(tokenizer),
        source(source),
        every_token(tokenizer.added_tokens()),
        every_but_thinking(WithoutThinking(tokenizer.added_tokens())) {}

  Result<TokenIds> EncodeMarked(std::string_view text, const Mark& mark) const;

  std::unique_ptr<tk_template, Free> handle;
  const Tokenizer& tokenizer;
  const std::string source;
  const ControlScanner every_token;
  const ControlScanner every_but_thinking;
};

ChatTemplate::ChatTemplate(std::unique_ptr<Content> content) : content_(std::move(content)) {}
ChatTemplate::~ChatTemplate() = default;

Result<std::unique_ptr<ChatTemplate>> ChatTemplate::Compile(std::string_view source,
                                                            const Tokenizer& tokenizer) {
  tk_init();
  tk_template* handle = nullptr;
  TextkitBytes message;
  const int32_t status = tk_template_new(BytePointer(source), source.size(), &handle, message.out());
  if (status != TK_OK) return TextkitError("chat template", status, message);
  return std::unique_ptr<ChatTemplate>(
      new ChatTemplate(std::make_unique<Content>(handle, tokenizer, source)));
}

Result<RenderedChat> ChatTemplate::Render(const ChatInput& input) const {
  if (input.continue_final_message && input.add_generation_prompt) {
    return Invalid("Cannot set both `continue_final_message` and `add_generation_prompt` to True.");
  }
  const std::vector<Mark> marks = FreeMarks({input.messages, input.tools, input.kwargs, content_->source});
  if (marks.size() < 2)
    return Invalid("messages: the text uses nearly all of the noncharacters U+FDD0 to U+FDEF");
  const Marking marking = {.every_token = content_->every_token,
                           .every_but_thinking = content_->every_but_thinking,
                           .mark = marks[0].bytes,
                           .tail = input.continue_final_message ? marks[1].bytes + " " : ""};
  const Tokenizer& tokenizer = content_->tokenizer;
  ASSIGN_OR_RETURN(const TemplateVariables variables,
                   WriteTemplateVariables(input, tokenizer.bos_token(), tokenizer.eos_token(), marking));
  TextkitBytes text;
  TextkitBytes message;
  const uint64_t steps = kMinSteps + kStepsPerByte * variables.json.size();
  const int32_t status = tk_template_render(content_->handle.get(), BytePointer(variables.json),
                                            variables.json.size(), steps, text.out(), message.out());
  if (status != TK_OK) return TextkitError("chat template", status, message);
  // A template may have written a mark as JSON escapes it (tojson with ensure_ascii).
  std::string rendered = Without(text.view(), marks[0].escape);
  if (input.continue_final_message) {
    ASSIGN_OR_RETURN(rendered, CutAtTail(std::move(rendered), variables.final_content, marks[1]));
  }
  ASSIGN_OR_RETURN(TokenIds ids, content_->EncodeMarked(rendered, marks[0]));
  return RenderedChat{Without(rendered, marks[0].bytes), std::move(ids)};
}

Result<TokenIds> ChatTemplate::Content::EncodeMarked(std::string_view text, const Mark& mark) const {
  TokenIds ids;
  std::string run;  // text since the last control token
  const auto encode_run = [&]() -> Status {
    if (run.empty()) return {};
    ASSIGN_OR_RETURN(const TokenIds run_ids, tokenizer.Encode(run, ControlTokens::kText));
    ids.insert(ids.end(), run_ids.begin(), run_ids.end());
    run.clear();
    return {};
  };
  for (size_t at = 0; at < text.size();) {
    if (text.substr(at).starts_with(mark.bytes)) {
      at += mark.bytes.size();
      continue;
    }
    const size_t size = every_token.MatchAt(text, at);
    // A control token of one character cannot be broken by a mark, only followed by one.
    if (size == 0 || text.substr(at + size).starts_with(mark.bytes)) {
      run += text[at++];
      continue;
    }
    RETURN_IF_ERROR(encode_run());
    ids.push_back(tokenizer.TokenId(text.substr(at, size)).value());
    at += size;
  }
  RETURN_IF_ERROR(encode_run());
  return ids;
}

}  // namespace tessera
