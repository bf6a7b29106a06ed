// See answer.h.
#include "http/answer.h"

#include <algorithm>

namespace tessera {
namespace {

// A token as it is shown: its text, with U+FFFD for parts of a character.
std::string ShownToken(const Tokenizer& tokenizer, int32_t token, bool as_id) {
  if (as_id) return Format("token_id:{}", token);
  const std::string_view bytes = tokenizer.TokenBytes(token);
  return IsUtf8(bytes) ? std::string(bytes) : RepairUtf8(bytes);
}

// Characters that begin in `bytes`: adds up to the characters of a text however tokens cut it.
int64_t CountCharacters(std::string_view bytes) {
  return std::count_if(bytes.begin(), bytes.end(),
                       [](char c) { return (static_cast<uint8_t>(c) & 0xC0) != 0x80; });
}

void AppendComma(std::string& list) {
  if (!list.empty()) list += ',';
}

void AppendBytes(std::string& out, std::string_view bytes) {
  out += '[';
  for (size_t i = 0; i < bytes.size(); ++i) {
    if (i > 0) out += ',';
    AppendJsonNumber(out, int64_t{static_cast<uint8_t>(bytes[i])});
  }
  out += ']';
}

void AppendOr(std::string& out, std::string_view json) {
  out += json.empty() ? std::string_view("null") : json;
}

void AppendStringOrNull(std::string& out, std::string_view text) {
  if (text.empty()) {
    out += "null";
  } else {
    AppendJsonString(out, text);
  }
}

void AppendIdsOrNull(std::string& out, const std::vector<int32_t>* ids) {
  if (ids) {
    AppendJsonIds(out, *ids);
  } else {
    out += "null";
  }
}

}  // namespace

const std::string_view kDoneEvent = "data: [DONE]\n\n";

void AppendErrorEvent(std::string& out, const ApiError& error) {
  out += "data: ";
  out += ErrorBody(error);
  out += "\n\n";
}

void AppendUsage(std::string& out, const Usage& usage, const UsageStyle& style) {
  out += "{\"prompt_tokens\":";
  AppendJsonNumber(out, usage.prompt_tokens);
  out += ",\"total_tokens\":";
  AppendJsonNumber(out, usage.prompt_tokens + usage.completion_tokens);
  out += ",\"completion_tokens\":";
  AppendJsonNumber(out, usage.completion_tokens);
  if (style.prompt_details) {
    out += ",\"prompt_tokens_details\":{\"cached_tokens\":";
    AppendJsonNumber(out, usage.cached_tokens);
    out += '}';
  }
  if (style.reasoning_details) {
    out += ",\"completion_tokens_details\":{\"reasoning_tokens\":";
    AppendJsonNumber(out, usage.reasoning_tokens);
    out += '}';
  }
  out += '}';
}

void LogprobText::Add(const RowOutput& row) {
  if (style_.kind == CallKind::kChat) return AddChat(row);
  AddCompletion(row.token, &row);
}

void LogprobText::AddWithoutLogprob(int32_t token) {
  AddCompletion(token, nullptr);
}

void LogprobText::AddCompletion(int32_t token, const RowOutput* row) {
  ++num_tokens_;
  AppendComma(tokens_);
  AppendJsonString(tokens_, ShownToken(tokenizer_, token, style_.tokens_as_ids));
  AppendComma(offsets_);
  AppendJsonNumber(offsets_, offset_);
  if (!style_.skip_special_tokens || !tokenizer_.IsSpecial(token)) {
    offset_ += CountCharacters(tokenizer_.TokenBytes(token));
  }
  AppendComma(logprobs_);
  AppendComma(tops_);
  if (!row) {
    logprobs_ += "null";
    tops_ += "null";
    return;
  }
  AppendLogprob(logprobs_, row->logprob);
  // A map: of tokens that look the same (parts of characters) the likeliest stays.
  std::vector<std::string> seen;
  tops_ += '{';
  const auto add = [&](int32_t id, float logprob) {
    std::string shown = ShownToken(tokenizer_, id, style_.tokens_as_ids);
    if (std::find(seen.begin(), seen.end(), shown) != seen.end()) return;
    if (!seen.empty()) tops_ += ',';
    AppendJsonString(tops_, shown);
    tops_ += ':';
    AppendLogprob(tops_, logprob);
    seen.push_back(std::move(shown));
  };
  for (const TokenLogprob& top : row->top) add(top.token, top.logprob);
  add(row->token, row->logprob);
  tops_ += '}';
}

void LogprobText::AddChat(const RowOutput& row) {
  const auto add = [&](int32_t token, float logprob) {
    tokens_ += "{\"token\":";
    AppendJsonString(tokens_, ShownToken(tokenizer_, token, style_.tokens_as_ids));
    tokens_ += ",\"logprob\":";
    AppendLogprob(tokens_, logprob);
    tokens_ += ",\"bytes\":";
    AppendBytes(tokens_, tokenizer_.TokenBytes(token));
  };
  ++num_tokens_;
  AppendComma(tokens_);
  add(row.token, row.logprob);
  tokens_ += ",\"top_logprobs\":[";
  const size_t num_top = std::min(row.top.size(), static_cast<size_t>(std::max(style_.num_top, 0)));
  for (size_t i = 0; i < num_top; ++i) {
    if (i > 0) tokens_ += ',';
    add(row.top[i].token, row.top[i].logprob);
    tokens_ += '}';
  }
  tokens_ += "]}";
}

std::string LogprobText::Take() {
  std::string json;
  if (style_.kind == CallKind::kChat) {
    json = "{\"content\":[" + tokens_ + "]}";
  } else {
    json = "{\"text_offset\":[" + offsets_ + "],\"token_logprobs\":[" + logprobs_ + "],\"tokens\":[" +
           tokens_ + "],\"top_logprobs\":[" + tops_ + "]}";
  }
  Drop();
  return json;
}

void LogprobText::Drop() {
  num_tokens_ = 0;
  for (std::string* list : {&tokens_, &logprobs_, &tops_, &offsets_}) list->clear();
}

std::string PromptLogprobsJson(const Tokenizer& tokenizer, const std::vector<RowOutput>& rows) {
  std::string json = "[null";
  for (const RowOutput& row : rows) {
    json += ",{";
    bool has_target = false;
    const auto add = [&](int32_t token, float logprob, size_t rank) {
      if (json.back() != '{') json += ',';
      json += Format("\"{}\":{{\"logprob\":", token);
      AppendLogprob(json, logprob);
      json +=
          Format(",\"rank\":{},\"decoded_token\":", rank == 0 ? std::string("null") : std::to_string(rank));
      AppendJsonString(json, ShownToken(tokenizer, token, false));
      json += '}';
      has_target |= token == row.token;
    };
    for (size_t i = 0; i < row.top.size(); ++i) add(row.top[i].token, row.top[i].logprob, i + 1);
    if (!has_target) add(row.token, row.logprob, 0);  // its rank is not computed
    json += '}';
  }
  json += ']';
  return json;
}

AnswerWriter::AnswerWriter(CallKind kind, std::string id, int64_t created, const std::string& model,
                           const std::string& fingerprint, std::string role, bool reasoning,
                           const UsageStyle& usage_style)
    : kind_(kind),
      id_(std::move(id)),
      role_(std::move(role)),
      reasoning_(reasoning),
      usage_style_(usage_style) {
  head_ = "{\"id\":";
  AppendJsonString(head_, id_);
  head_ += Format(",\"created\":{},\"model\":", created);
  AppendJsonString(head_, model);
  head_ += ",\"system_fingerprint\":";
  AppendJsonString(head_, fingerprint);
  head_ += ",\"object\":\"";
  const bool chat = kind == CallKind::kChat;
  chunk_prefix_ =
      "data: " + head_ + (chat ? "chat.completion.chunk" : "text_completion") + "\",\"choices\":[";
  head_ += chat ? "chat.completion\"" : "text_completion\"";
}

void AnswerWriter::AppendDelta(std::string& out, const AnswerPiece& piece) const {
  out += ",\"delta\":{";
  if (piece.role_chunk) {
    out += "\"role\":";
    AppendJsonString(out, role_);
    out += ",\"content\":\"\"";
  }
  if (!piece.reasoning.empty()) {
    std::string escaped;
    AppendJsonString(escaped, piece.reasoning);
    out += "\"reasoning\":" + escaped + ",\"reasoning_content\":" + escaped;
  }
  if (!piece.text.empty()) {
    out += piece.reasoning.empty() ? "\"content\":\"" : ",\"content\":\"";
    AppendJsonEscaped(out, piece.text);
    out += '"';
  }
  out += '}';
}

void AnswerWriter::AppendChunk(std::string& out, const AnswerPiece& piece) const {
  out += chunk_prefix_;
  out += "{\"index\":";
  AppendJsonNumber(out, int64_t{piece.index});
  if (kind_ == CallKind::kChat) {
    AppendDelta(out, piece);
  } else {
    out += ",\"text\":\"";
    AppendJsonEscaped(out, piece.text);
    out += '"';
  }
  out += ",\"logprobs\":";
  AppendOr(out, piece.logprobs);
  out += ",\"finish_reason\":";
  AppendStringOrNull(out, piece.finish);
  if (kind_ == CallKind::kCompletion || !piece.finish.empty()) {
    out += ",\"stop_reason\":";
    AppendOr(out, piece.stop_reason);
  }
  if (piece.token_ids) {
    out += ",\"token_ids\":";
    AppendJsonIds(out, *piece.token_ids);
  }
  if (piece.prompt_ids && kind_ == CallKind::kCompletion) {
    out += ",\"prompt_token_ids\":";
    AppendJsonIds(out, *piece.prompt_ids);
  }
  out += "}]";
  if (piece.prompt_ids && kind_ == CallKind::kChat) {
    out += ",\"prompt_token_ids\":";
    AppendJsonIds(out, *piece.prompt_ids);
  }
  if (piece.usage) {
    out += ",\"usage\":";
    AppendUsage(out, *piece.usage, usage_style_);
  }
  out += "}\n\n";
}

void AnswerWriter::AppendUsageChunk(std::string& out, const Usage& usage) const {
  out += chunk_prefix_;
  out += "],\"usage\":";
  AppendUsage(out, usage, usage_style_);
  out += "}\n\n";
}

void AnswerWriter::AppendChoice(std::string& out, const AnswerPiece& piece) const {
  if (!out.empty()) out += ',';
  out += Format("{{\"index\":{}", piece.index);
  if (kind_ == CallKind::kChat) {
    out += ",\"message\":{\"role\":";
    AppendJsonString(out, role_);
    out += ",\"content\":";
    if (piece.text.empty() && reasoning_) {
      out += "null";
    } else {
      AppendJsonString(out, piece.text);
    }
    out += ",\"refusal\":null,\"annotations\":null,\"audio\":null,\"function_call\":null,\"reasoning\":";
    AppendStringOrNull(out, piece.reasoning);
    out += ",\"reasoning_content\":";
    AppendStringOrNull(out, piece.reasoning);
    out += '}';
  } else {
    out += ",\"text\":";
    AppendJsonString(out, piece.text);
  }
  out += ",\"logprobs\":";
  AppendOr(out, piece.logprobs);
  out += ",\"finish_reason\":";
  AppendStringOrNull(out, piece.finish);
  out += ",\"stop_reason\":";
  AppendOr(out, piece.stop_reason);
  out += ",\"token_ids\":";
  AppendIdsOrNull(out, piece.token_ids);
  if (kind_ == CallKind::kChat) {
    out += ",\"routed_experts\":null";
  } else {
    out += ",\"prompt_logprobs\":";
    AppendOr(out, piece.prompt_logprobs);
    out += ",\"prompt_token_ids\":";
    AppendIdsOrNull(out, piece.prompt_ids);
  }
  out += '}';
}

std::string AnswerWriter::Whole(std::string_view choices, const Usage& usage,
                                std::string_view prompt_logprobs,
                                const std::vector<int32_t>* prompt_ids) const {
  std::string body = head_;
  body += ",\"choices\":[";
  body += choices;
  body += "],\"service_tier\":null,\"usage\":";
  AppendUsage(body, usage, usage_style_);
  if (kind_ == CallKind::kChat) {
    body += ",\"prompt_logprobs\":";
    AppendOr(body, prompt_logprobs);
    body += ",\"prompt_token_ids\":";
    AppendIdsOrNull(body, prompt_ids);
    body += ",\"prompt_text\":null";
  }
  body += ",\"kv_transfer_params\":null,\"ec_transfer_params\":null,\"metrics\":null}";
  return body;
}

}  // namespace tessera
