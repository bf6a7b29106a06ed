// Text <-> token ids of one checkpoint: tokenizer.json and the rules of tokenizer_config.json.
// A thin bridge onto ../textkit (Hugging Face tokenizers). Immutable after loading; any thread.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"

namespace tessera {

using TokenIds = std::vector<int32_t>;

// What a control token ("<｜User｜>") written in the text becomes.
enum class ControlTokens {
  kParse,  // the token: raw completion prompts, text written by a chat template
  kText,   // plain text tokens: whatever a user wrote inside a chat message
};

class Tokenizer {
 public:
  // Reads tokenizer.json (required), tokenizer_config.json (optional) and chat_template.jinja (optional,
  // instead of the config's template) of a folder.
  static Result<std::unique_ptr<Tokenizer>> Load(const std::string& folder);
  // The same from memory; `config_json` may be empty.
  static Result<std::unique_ptr<Tokenizer>> Parse(std::string_view tokenizer_json,
                                                  std::string_view config_json);
  ~Tokenizer();

  // Adds no BOS. Text must be UTF-8: kInvalid otherwise.
  Result<TokenIds> Encode(std::string_view text, ControlTokens control) const;
  // `text` with BOS in front where tokenizer_config.json says so (add_bos_token) and the text does not
  // already start with it; control tokens are parsed. The rule for raw completion prompts.
  Result<TokenIds> EncodePrompt(std::string_view text, bool add_special_tokens) const;
  // Valid UTF-8; broken sequences become U+FFFD. Ids outside the vocabulary give nothing.
  std::string Decode(std::span<const int32_t> ids, bool skip_special_tokens) const;
  // The raw bytes of one token; empty for ids that do not exist. May be a part of a UTF-8 sequence.
  std::string_view TokenBytes(int32_t id) const;
  // Added tokens whose `special` flag is set (skipped when decoding for users). "<think>" is not special.
  bool IsSpecial(int32_t id) const;
  bool IsAdded(int32_t id) const;
  // The text of ids is exactly their joined TokenBytes (ByteLevel decoders).
  bool byte_exact() const;

  int32_t vocab_size() const;  // highest id + 1, added tokens included
  std::optional<int32_t> TokenId(std::string_view token) const;
  std::optional<int32_t> bos_id() const;
  std::optional<int32_t> eos_id() const;
  bool add_bos() const;
  // The tokens written as text, for templates; empty where there is none.
  const std::string& bos_token() const;
  const std::string& eos_token() const;
  // chat_template of tokenizer_config.json; empty where there is none.
  const std::string& chat_template() const;
  // Texts of all added tokens, longest first.
  const std::vector<std::string>& added_tokens() const;

 private:
  struct Content;
  explicit Tokenizer(std::unique_ptr<Content> content);
  std::unique_ptr<Content> content_;
};

}  // namespace tessera
