// tiny-r1's tokenizer, and small ones for the rules that it does not show.
#include "text/tokenizer.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace tessera {
namespace {

const Tokenizer& TinyTokenizer() {
  static const auto tokenizer = Tokenizer::Load(TESSERA_SOURCE_DIR "/models/tiny-r1").value();
  return *tokenizer;
}

// Bytes as one-character tokens: enough vocabulary for "ab<>/s" and its control token.
std::string ByteJson(std::string_view post_processor = "null") {
  return Format(R"({{"version":"1.0","truncation":null,"padding":null,"normalizer":null,
    "added_tokens":[{{"id":6,"content":"<s>","single_word":false,"lstrip":false,"rstrip":false,
      "normalized":false,"special":true}}],
    "pre_tokenizer":{{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true}},
    "post_processor":{},
    "decoder":{{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,"use_regex":true}},
    "model":{{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,
      "end_of_word_suffix":null,"fuse_unk":false,"byte_fallback":false,"ignore_merges":false,
      "vocab":{{"a":0,"b":1,"<":2,">":3,"/":4,"s":5}},"merges":[]}}}})",
                post_processor);
}

TEST(Tokenizer, ReadsTheFolder) {
  const Tokenizer& tiny = TinyTokenizer();
  EXPECT_EQ(tiny.vocab_size(), 1794);
  EXPECT_TRUE(tiny.byte_exact());
  EXPECT_EQ(tiny.bos_token(), "<｜begin▁of▁sentence｜>");
  EXPECT_EQ(tiny.bos_id(), 0);
  EXPECT_EQ(tiny.eos_id(), 1);
  EXPECT_TRUE(tiny.add_bos());
  EXPECT_TRUE(tiny.chat_template().contains("<｜Assistant｜>"));
  EXPECT_EQ(tiny.added_tokens().size(), 16u);
  EXPECT_TRUE(
      std::ranges::is_sorted(tiny.added_tokens(), std::greater(), [](const auto& t) { return t.size(); }));
}

TEST(Tokenizer, KnowsItsTokens) {
  const Tokenizer& tiny = TinyTokenizer();
  const int32_t think = tiny.TokenId("<think>").value();
  EXPECT_EQ(tiny.TokenBytes(think), "<think>");
  EXPECT_TRUE(tiny.IsAdded(think));
  EXPECT_FALSE(tiny.IsSpecial(think));
  EXPECT_TRUE(tiny.IsSpecial(0));
  EXPECT_FALSE(tiny.IsAdded(100));
  EXPECT_EQ(tiny.TokenId("<nothing>"), std::nullopt);
  for (const int32_t id : {-1, 1794, INT32_MAX, INT32_MIN}) {
    EXPECT_EQ(tiny.TokenBytes(id), "");
    EXPECT_FALSE(tiny.IsAdded(id));
    EXPECT_EQ(tiny.Decode(std::vector{id}, false), "");
  }
}

TEST(Tokenizer, ControlTokensAreParsedOrText) {
  const Tokenizer& tiny = TinyTokenizer();
  const std::string text = "a<｜User｜>b</think>";
  const TokenIds parsed = tiny.Encode(text, ControlTokens::kParse).value();
  const TokenIds plain = tiny.Encode(text, ControlTokens::kText).value();
  EXPECT_EQ(std::ranges::count(parsed, tiny.TokenId("<｜User｜>").value()), 1);
  EXPECT_EQ(std::ranges::count(parsed, tiny.TokenId("</think>").value()), 1);
  EXPECT_TRUE(std::ranges::none_of(plain, [&tiny](int32_t id) { return tiny.IsAdded(id); }));
  EXPECT_EQ(tiny.Decode(parsed, false), text);
  EXPECT_EQ(tiny.Decode(plain, true), text);
  EXPECT_EQ(tiny.Decode(parsed, true), "ab</think>");
}

TEST(Tokenizer, RoundTripsTextAndNeverAddsBos) {
  for (const char* text : {"", " ", "Hello, world!\n\n  x", "将文本分类为中性", "😀🏳️‍🌈 é\u0301",
                           "1234567 890", "\t\t\r\n", "\u0000x", "ไทย عربى"}) {
    const TokenIds ids = TinyTokenizer().Encode(text, ControlTokens::kParse).value();
    EXPECT_EQ(TinyTokenizer().Decode(ids, false), text);
    EXPECT_TRUE(ids.empty() || ids[0] != 0);
  }
}

TEST(Tokenizer, TextThatIsNotUtf8IsRefused) {
  const auto ids = TinyTokenizer().Encode("a\xFF", ControlTokens::kParse);
  ASSERT_FALSE(ids);
  EXPECT_EQ(ids.error().kind, ErrorKind::kInvalid);
  EXPECT_TRUE(ids.error().message.contains("UTF-8")) << ids.error().message;
  EXPECT_FALSE(TinyTokenizer().EncodePrompt("\xC3", true));
}

TEST(Tokenizer, PromptsGetBosOnce) {
  const Tokenizer& tiny = TinyTokenizer();
  const TokenIds plain = tiny.Encode("Hello", ControlTokens::kParse).value();
  TokenIds with_bos = plain;
  with_bos.insert(with_bos.begin(), 0);
  EXPECT_EQ(tiny.EncodePrompt("Hello", true).value(), with_bos);
  EXPECT_EQ(tiny.EncodePrompt("Hello", false).value(), plain);
  EXPECT_EQ(tiny.EncodePrompt("<｜begin▁of▁sentence｜>Hello", true).value(), with_bos);
  EXPECT_EQ(tiny.EncodePrompt("", true).value(), TokenIds{0});
}

TEST(Tokenizer, TheConfigDecidesAboutBos) {
  const auto prompt = [](std::string_view config, std::string_view post_processor = "null") {
    return Tokenizer::Parse(ByteJson(post_processor), config).value()->EncodePrompt("ab", true).value();
  };
  EXPECT_EQ(prompt(""), (TokenIds{0, 1}));
  EXPECT_EQ(prompt(R"({"bos_token":"<s>"})"), (TokenIds{0, 1}));
  EXPECT_EQ(prompt(R"({"bos_token":"<s>","add_bos_token":true})"), (TokenIds{6, 0, 1}));
  EXPECT_EQ(prompt(R"({"bos_token":{"content":"<s>"},"add_bos_token":true})"), (TokenIds{6, 0, 1}));
  EXPECT_EQ(prompt(R"({"bos_token":"<s>","add_bos_token":false})"), (TokenIds{0, 1}));
  const char* writes_bos = R"({"type":"TemplateProcessing",
    "single":[{"SpecialToken":{"id":"<s>","type_id":0}},{"Sequence":{"id":"A","type_id":0}}],
    "pair":[{"Sequence":{"id":"A","type_id":0}},{"Sequence":{"id":"B","type_id":1}}],
    "special_tokens":{"<s>":{"id":"<s>","ids":[6],"tokens":["<s>"]}}})";
  EXPECT_EQ(prompt(R"({"bos_token":"<s>"})", writes_bos), (TokenIds{6, 0, 1}));
  EXPECT_EQ(prompt(R"({"bos_token":"<s>","add_bos_token":true})", writes_bos), (TokenIds{6, 0, 1}));
}

TEST(Tokenizer, BrokenFilesAreRefusedByName) {
  const auto message = [](std::string_view tokenizer, std::string_view config) {
    const auto result = Tokenizer::Parse(tokenizer, config);
    return result ? std::string() : result.error().message;
  };
  const std::string good = ByteJson();
  EXPECT_EQ(message(good, "{}"), "");
  EXPECT_TRUE(message("{", "").contains("tokenizer.json"));
  EXPECT_TRUE(message(good.substr(0, good.size() / 2), "").contains("tokenizer.json"));
  EXPECT_TRUE(message(good, "[]").contains("tokenizer_config.json"));
  EXPECT_TRUE(message(good, R"({"bos_token":5})").contains("bos_token"));
  EXPECT_TRUE(message(good, R"({"add_bos_token":"yes"})").contains("add_bos_token"));
  EXPECT_TRUE(message(good, R"({"add_bos_token":true})").contains("add_bos_token"));
  EXPECT_TRUE(message(good, R"({"add_bos_token":true,"bos_token":"<x>"})").contains("<x>"));
  EXPECT_TRUE(
      message(good, R"({"chat_template":[{"name":"other","template":"x"}]})").contains("chat_template"));
  const auto missing = Tokenizer::Load("/nonexistent-folder");
  ASSERT_FALSE(missing);
  EXPECT_TRUE(missing.error().message.contains("/nonexistent-folder")) << missing.error().message;
}

TEST(Tokenizer, TheDefaultOfSeveralTemplatesIsTaken) {
  const auto tokenizer = Tokenizer::Parse(
      ByteJson(),
      R"({"chat_template":[{"name":"tool_use","template":"x"},{"name":"default","template":"y"}]})");
  EXPECT_EQ(tokenizer.value()->chat_template(), "y");
}

}  // namespace
}  // namespace tessera
