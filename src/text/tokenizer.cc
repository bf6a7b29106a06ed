// The bridge onto textkit's tokenizer: ids cross as uint32, texts with their length, errors as values.
#include "text/tokenizer.h"

#include <algorithm>
#include <utility>

#include "base/file.h"
#include "base/json.h"
#include "text/textkit_bridge.h"
#include "text/utf8.h"

namespace tessera {
namespace {

struct TokenizerConfig {
  bool add_bos = false;
  std::string bos_token;
  std::string eos_token;
  std::string chat_template;
};

// A token is a text, or an object with the text as content.
Result<std::string> TokenText(const JsonValue& config, std::string_view name) {
  const JsonValue* token = config.Find(name);
  if (token == nullptr || token->is_null()) return std::string();
  if (const JsonValue* content = token->Find("content")) token = content;
  if (token->is_text()) return token->text();
  return Invalid("tokenizer_config.json: {} is {}, expected a text or an object with content", name,
                 token->Describe());
}

// A text, or a list of named ones of which "default" is meant.
Result<std::string> TemplateText(const JsonValue& config) {
  const JsonValue* value = config.Find("chat_template");
  if (value == nullptr || value->is_null()) return std::string();
  if (value->is_text()) return value->text();
  for (const JsonValue& entry : value->items()) {
    const JsonValue* name = entry.Find("name");
    const JsonValue* text = entry.Find("template");
    if (name != nullptr && name->text() == "default" && text != nullptr && text->is_text())
      return text->text();
  }
  return Invalid(
      "tokenizer_config.json: chat_template is {}, expected a text or a list with an entry 'default'",
      value->Describe());
}

Result<TokenizerConfig> ParseTokenizerConfig(std::string_view json) {
  ASSIGN_OR_RETURN(const JsonValue config, ParseJson(json, "tokenizer_config.json"));
  if (!config.is_object()) {
    return Invalid("tokenizer_config.json: {}, expected an object", config.Describe());
  }
  TokenizerConfig result;
  if (const JsonValue* add = config.Find("add_bos_token"); add != nullptr && !add->is_null()) {
    if (add->AsBool() == nullptr) {
      return Invalid("tokenizer_config.json: add_bos_token is {}, expected true or false", add->Describe());
    }
    result.add_bos = *add->AsBool();
  }
  ASSIGN_OR_RETURN(result.bos_token, TokenText(config, "bos_token"));
  ASSIGN_OR_RETURN(result.eos_token, TokenText(config, "eos_token"));
  ASSIGN_OR_RETURN(result.chat_template, TemplateText(config));
  return result;
}

}  // namespace

struct Tokenizer::Content {
  struct Free {
    void operator()(tk_tokenizer* handle) const { tk_tokenizer_free(handle); }
  };
  std::unique_ptr<tk_tokenizer, Free> handle;
  bool byte_exact = false;
  TokenizerConfig config;
  std::optional<int32_t> bos_id;
  std::optional<int32_t> eos_id;
  std::vector<std::string> added_tokens;

  // Flags of a token, or -1; `bytes` its bytes.
  int32_t Lookup(int32_t id, std::string_view* bytes) const {
    const uint8_t* data = nullptr;
    size_t size = 0;
    const int32_t flags =
        id < 0 ? -1 : tk_tokenizer_token_bytes(handle.get(), static_cast<uint32_t>(id), &data, &size);
    if (bytes != nullptr) *bytes = {reinterpret_cast<const char*>(data), flags < 0 ? 0 : size};
    return flags;
  }
};

Tokenizer::Tokenizer(std::unique_ptr<Content> content) : content_(std::move(content)) {}
Tokenizer::~Tokenizer() = default;

Result<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::string& folder) {
  ASSIGN_OR_RETURN(const std::string tokenizer_json, ReadFile(folder + "/tokenizer.json"));
  std::string config_json;
  if (const std::string path = folder + "/tokenizer_config.json"; FileExists(path)) {
    ASSIGN_OR_RETURN(config_json, ReadFile(path));
  }
  auto tokenizer = Parse(tokenizer_json, config_json);
  if (!tokenizer) {
    tokenizer.error().message = Format("{}: {}", folder, tokenizer.error().message);
    return tokenizer;
  }
  if (const std::string path = folder + "/chat_template.jinja"; FileExists(path)) {
    ASSIGN_OR_RETURN((*tokenizer)->content_->config.chat_template, ReadFile(path));
  }
  return tokenizer;
}

Result<std::unique_ptr<Tokenizer>> Tokenizer::Parse(std::string_view tokenizer_json,
                                                    std::string_view config_json) {
  tk_init();
  auto content = std::make_unique<Content>();
  tk_tokenizer* handle = nullptr;
  TextkitBytes message;
  const int32_t status =
      tk_tokenizer_new(BytePointer(tokenizer_json), tokenizer_json.size(), &handle, message.out());
  if (status != TK_OK) return TextkitError("tokenizer", status, message);
  content->handle.reset(handle);
  content->byte_exact = tk_tokenizer_is_byte_level(handle) == 1;
  if (!config_json.empty()) {
    ASSIGN_OR_RETURN(content->config, ParseTokenizerConfig(config_json));
  }
  const int32_t vocab_size = static_cast<int32_t>(tk_tokenizer_vocab_size(handle));
  for (int32_t id = 0; id < vocab_size; ++id) {
    std::string_view text;
    if (const int32_t flags = content->Lookup(id, &text); flags > 0) content->added_tokens.emplace_back(text);
  }
  std::ranges::sort(content->added_tokens, [](const std::string& a, const std::string& b) {
    return a.size() != b.size() ? a.size() > b.size() : a < b;
  });
  auto tokenizer = std::unique_ptr<Tokenizer>(new Tokenizer(std::move(content)));
  const TokenizerConfig& config = tokenizer->content_->config;
  if (!config.bos_token.empty()) tokenizer->content_->bos_id = tokenizer->TokenId(config.bos_token);
  if (!config.eos_token.empty()) tokenizer->content_->eos_id = tokenizer->TokenId(config.eos_token);
  if (config.add_bos && !tokenizer->bos_id()) {
    return Invalid(
        "tokenizer_config.json: add_bos_token is true, but bos_token '{}' is not in the vocabulary",
        config.bos_token);
  }
  return tokenizer;
}

namespace {

Result<TokenIds> EncodeWith(const tk_tokenizer* handle, std::string_view text, bool parse_added,
                            bool add_special) {
  tk_ids ids = {nullptr, 0, 0};
  TextkitBytes message;
  const int32_t status = tk_tokenizer_encode(handle, BytePointer(text), text.size(), parse_added, add_special,
                                             &ids, message.out());
  if (status != TK_OK) return TextkitError("tokenizer", status, message);
  TokenIds result(ids.data, ids.data + ids.len);
  tk_ids_free(&ids);
  return result;
}

}  // namespace

Result<TokenIds> Tokenizer::Encode(std::string_view text, ControlTokens control) const {
  return EncodeWith(content_->handle.get(), text, control == ControlTokens::kParse, /*add_special=*/false);
}

Result<TokenIds> Tokenizer::EncodePrompt(std::string_view text, bool add_special_tokens) const {
  const bool has_bos = bos_id().has_value() && text.starts_with(bos_token());
  const bool add_special = add_special_tokens && !has_bos;
  // Some post-processors write BOS themselves (Llama 3); DeepSeek's does not.
  ASSIGN_OR_RETURN(TokenIds ids, EncodeWith(content_->handle.get(), text, /*parse_added=*/true, add_special));
  if (add_special && add_bos() && (ids.empty() || ids.front() != *bos_id()))
    ids.insert(ids.begin(), *bos_id());
  return ids;
}

std::string Tokenizer::Decode(std::span<const int32_t> ids, bool skip_special_tokens) const {
  std::vector<uint32_t> known;
  known.reserve(ids.size());
  for (const int32_t id : ids) {
    if (content_->Lookup(id, nullptr) >= 0) known.push_back(static_cast<uint32_t>(id));
  }
  TextkitBytes text;
  TextkitBytes message;
  const int32_t status = tk_tokenizer_decode(content_->handle.get(), known.data(), known.size(),
                                             skip_special_tokens, text.out(), message.out());
  if (status == TK_OK) return std::string(text.view());
  // A decoder that fails on known ids (none is known to): their raw text instead of nothing.
  std::string bytes;
  std::string raw;
  for (const uint32_t id : known) bytes += TokenBytes(static_cast<int32_t>(id));
  DrainUtf8(bytes, raw);
  return raw;
}

std::string_view Tokenizer::TokenBytes(int32_t id) const {
  std::string_view bytes;
  content_->Lookup(id, &bytes);
  return bytes;
}

bool Tokenizer::IsSpecial(int32_t id) const {
  const int32_t flags = content_->Lookup(id, nullptr);
  return flags > 0 && (flags & TK_SPECIAL) != 0;
}
bool Tokenizer::IsAdded(int32_t id) const {
  const int32_t flags = content_->Lookup(id, nullptr);
  return flags > 0 && (flags & TK_ADDED) != 0;
}
bool Tokenizer::byte_exact() const {
  return content_->byte_exact;
}

int32_t Tokenizer::vocab_size() const {
  return static_cast<int32_t>(tk_tokenizer_vocab_size(content_->handle.get()));
}

std::optional<int32_t> Tokenizer::TokenId(std::string_view token) const {
  const int64_t id = tk_tokenizer_token_id(content_->handle.get(), BytePointer(token), token.size());
  if (id < 0) return std::nullopt;
  return static_cast<int32_t>(id);
}

std::optional<int32_t> Tokenizer::bos_id() const {
  return content_->bos_id;
}
std::optional<int32_t> Tokenizer::eos_id() const {
  return content_->eos_id;
}
bool Tokenizer::add_bos() const {
  return content_->config.add_bos;
}
const std::string& Tokenizer::bos_token() const {
  return content_->config.bos_token;
}
const std::string& Tokenizer::eos_token() const {
  return content_->config.eos_token;
}
const std::string& Tokenizer::chat_template() const {
  return content_->config.chat_template;
}
const std::vector<std::string>& Tokenizer::added_tokens() const {
  return content_->added_tokens;
}

}  // namespace tessera
