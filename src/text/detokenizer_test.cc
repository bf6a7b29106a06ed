// The stream against the whole: whatever is pushed, the pieces join to what a one-shot reader would write.
#include "text/detokenizer.h"

#include <gtest/gtest.h>

#include "base/random.h"
#include "text/utf8.h"

namespace tessera {
namespace {

const Tokenizer& TinyTokenizer() {
  static const auto tokenizer = Tokenizer::Load(TESSERA_SOURCE_DIR "/models/tiny-r1").value();
  return *tokenizer;
}

struct Outcome {
  std::string text;
  std::optional<std::string> stopped;
  bool operator==(const Outcome&) const = default;
};

bool IsUtf8(std::string text) {
  std::string bytes = text;
  std::string decoded;
  DrainUtf8(bytes, decoded);
  return bytes.empty() && decoded == text;
}

Outcome Stream(const TokenIds& ids, const StopRules& rules) {
  Detokenizer detokenizer(TinyTokenizer(), rules);
  std::string text;
  for (const int32_t id : ids) {
    const std::string piece = detokenizer.Push(id);
    EXPECT_TRUE(IsUtf8(piece)) << "a piece splits a character";
    text += piece;
    if (detokenizer.stopped()) break;
  }
  text += detokenizer.Finish();
  return {text, detokenizer.stopped()};
}

// The text that is certain after the first `count` tokens: all but an unfinished character.
std::string CertainText(const TokenIds& ids, size_t count, bool skip_special) {
  std::string bytes;
  for (size_t i = 0; i < count; ++i) {
    if (!skip_special || !TinyTokenizer().IsSpecial(ids[i])) bytes += TinyTokenizer().TokenBytes(ids[i]);
  }
  std::string text;
  DrainUtf8(bytes, text);
  return text;
}

// After every token, every stop string is looked for in the whole text behind the first min_tokens.
Outcome OneShot(const TokenIds& ids, const StopRules& rules) {
  const size_t min_tokens = std::min(ids.size(), static_cast<size_t>(rules.min_tokens));
  const size_t floor = CertainText(ids, min_tokens, rules.skip_special_tokens).size();
  for (size_t count = min_tokens + 1; count <= ids.size(); ++count) {
    const std::string text = CertainText(ids, count, rules.skip_special_tokens);
    for (const std::string& stop : rules.strings) {
      const size_t found = text.find(stop, floor);
      if (found == std::string::npos) continue;
      return {text.substr(0, found + (rules.include_in_output ? stop.size() : 0)), stop};
    }
  }
  return {TinyTokenizer().Decode(ids, rules.skip_special_tokens), std::nullopt};
}

// Bytes of many scripts in pieces: tokens of a mixed text, some of them replaced by random ones.
TokenIds RandomIds(RandomStream* random) {
  static const std::string kText =
      "The cat 😀 sat 吃饭，日本語 naïve\n\n  ééé aXbXc </think> 🏳️‍🌈 end. end. ";
  TokenIds ids;
  while (ids.size() < 3 + random->Below(40)) {
    const TokenIds text = TinyTokenizer().Encode(kText, ControlTokens::kText).value();
    const size_t begin = random->Below(static_cast<uint32_t>(text.size()));
    for (size_t i = begin; i < std::min(text.size(), begin + 1 + random->Below(12)); ++i) {
      const bool stray = random->Below(8) == 0;
      ids.push_back(stray ? static_cast<int32_t>(random->Below(TinyTokenizer().vocab_size() + 5)) : text[i]);
    }
  }
  return ids;
}

std::string RandomStop(const TokenIds& ids, RandomStream* random) {
  const std::string text = TinyTokenizer().Decode(ids, false);
  for (int attempt = 0; attempt < 20; ++attempt) {
    const size_t begin = CharacterBoundary(text, random->Below(static_cast<uint32_t>(text.size())));
    const size_t end = CharacterBoundary(text, begin + 1 + random->Below(9));
    if (end > begin) return text.substr(begin, end - begin);
  }
  return "zq";
}

TEST(Detokenizer, EqualsOneShotForRandomTokensAndStops) {
  int num_stopped = 0;
  for (uint64_t seed = 0; seed < 4000; ++seed) {
    RandomStream random(seed);
    const TokenIds ids = RandomIds(&random);
    StopRules rules;
    for (uint32_t i = random.Below(4); i > 0; --i) rules.strings.push_back(RandomStop(ids, &random));
    rules.include_in_output = random.Below(2) == 1;
    rules.min_tokens = static_cast<int>(random.Below(3) == 0 ? random.Below(20) : 0);
    rules.skip_special_tokens = random.Below(2) == 1;
    const Outcome streamed = Stream(ids, rules);
    const Outcome expected = OneShot(ids, rules);
    ASSERT_EQ(streamed.text, expected.text) << "seed " << seed;
    ASSERT_EQ(streamed.stopped, expected.stopped) << "seed " << seed;
    num_stopped += streamed.stopped.has_value();
  }
  EXPECT_GT(num_stopped, 1000);
  EXPECT_LT(num_stopped, 3500);
}

TEST(Detokenizer, HoldsBackAnUnfinishedCharacter) {
  const TokenIds ids = TinyTokenizer().Encode("😀", ControlTokens::kText).value();
  ASSERT_GT(ids.size(), 1u) << "the vocabulary has the whole character";
  Detokenizer detokenizer(TinyTokenizer(), {});
  for (size_t i = 0; i + 1 < ids.size(); ++i) EXPECT_EQ(detokenizer.Push(ids[i]), "");
  EXPECT_EQ(detokenizer.Push(ids.back()), "😀");
  EXPECT_EQ(detokenizer.Push(ids[0]), "");
  EXPECT_EQ(detokenizer.Finish(), "\uFFFD");
}

TEST(Detokenizer, HoldsBackOnlyWhereStopsAreCutOff) {
  const TokenIds ids = TinyTokenizer().Encode("abcdefgh", ControlTokens::kText).value();
  Detokenizer open(TinyTokenizer(), {.strings = {"wxyz"}, .include_in_output = true});
  Detokenizer cut(TinyTokenizer(), {.strings = {"wxyz"}});
  std::string opened;
  std::string held;
  for (const int32_t id : ids) {
    opened += open.Push(id);
    held += cut.Push(id);
  }
  EXPECT_EQ(opened, "abcdefgh");
  EXPECT_EQ(held, "abcde");
  EXPECT_EQ(cut.Finish(), "fgh");
}

TEST(Detokenizer, TheFirstStopInTheListWins) {
  const TokenIds ids = TinyTokenizer().Encode("one two", ControlTokens::kText).value();
  TokenIds at_once = {TinyTokenizer().TokenId("</think>").value()};
  Detokenizer detokenizer(TinyTokenizer(), {.strings = {"nk>", "</", "x"}});
  EXPECT_EQ(detokenizer.Push(at_once[0]), "</thi");
  EXPECT_EQ(detokenizer.stopped(), "nk>");
  EXPECT_EQ(detokenizer.Finish(), "");
  EXPECT_EQ(Stream(ids, {.strings = {"two", "one"}}), (Outcome{"", "one"}))
      << "the first token that completes one";
}

TEST(Detokenizer, TextOfTheFirstTokensIsNeverSearched) {
  const TokenIds ids = TinyTokenizer().Encode("stop and stop", ControlTokens::kText).value();
  EXPECT_EQ(Stream(ids, {.strings = {"stop"}}).text, "");
  const int all = static_cast<int>(ids.size());
  EXPECT_EQ(Stream(ids, {.strings = {"stop"}, .min_tokens = all}), (Outcome{"stop and stop", std::nullopt}));
  TokenIds first = TinyTokenizer().Encode("stop", ControlTokens::kText).value();
  const int beginning = static_cast<int>(first.size());
  EXPECT_EQ(Stream(ids, {.strings = {"stop"}, .include_in_output = true, .min_tokens = beginning}).text,
            "stop and stop");
  EXPECT_EQ(Stream(ids, {.strings = {"p and"}, .min_tokens = beginning}).stopped, std::nullopt)
      << "a stop string may not begin in them either";
}

TEST(Detokenizer, SpecialTokensAreSkippedOrShown) {
  const int32_t user = TinyTokenizer().TokenId("<｜User｜>").value();
  const int32_t think = TinyTokenizer().TokenId("<think>").value();
  EXPECT_EQ(Stream({user, think}, {}).text, "<think>");
  EXPECT_EQ(Stream({user, think}, {.strings = {}, .skip_special_tokens = false}).text, "<｜User｜><think>");
}

// A tokenizer whose decoder is not ByteLevel: blanks as U+2581, bytes as <0xNN>, the first blank dropped.
const Tokenizer& PieceTokenizer() {
  static const auto tokenizer = Tokenizer::Parse(R"({"version":"1.0","truncation":null,"padding":null,
    "added_tokens":[],"normalizer":null,"pre_tokenizer":null,"post_processor":null,
    "decoder":{"type":"Sequence","decoders":[
      {"type":"Replace","pattern":{"String":"▁"},"content":" "},{"type":"ByteFallback"},{"type":"Fuse"},
      {"type":"Strip","content":" ","start":1,"stop":0}]},
    "model":{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,
      "end_of_word_suffix":null,
      "fuse_unk":false,"byte_fallback":true,"ignore_merges":false,
      "vocab":{"▁a":0,"▁b":1,"c":2,"<0xF0>":3,"<0x9F>":4,"<0x98>":5,"<0x80>":6},"merges":[]}})",
                                                 "")
                                    .value();
  return *tokenizer;
}

TEST(Detokenizer, OtherDecodersGoThroughAWindow) {
  ASSERT_FALSE(PieceTokenizer().byte_exact());
  RandomStream random(7);
  for (int round = 0; round < 300; ++round) {
    TokenIds ids;
    for (uint32_t i = random.Below(12); i > 0; --i) {
      if (random.Below(3) == 0) {
        ids.insert(ids.end(), {3, 4, 5, 6});
      } else {
        ids.push_back(static_cast<int32_t>(random.Below(3)));
      }
    }
    Detokenizer detokenizer(PieceTokenizer(), {});
    std::string text;
    for (const int32_t id : ids) text += detokenizer.Push(id);
    text += detokenizer.Finish();
    ASSERT_EQ(text, PieceTokenizer().Decode(ids, false)) << "round " << round;
  }
}

TEST(Utf8, BrokenPartsBecomeOneReplacementEach) {
  const auto drain = [](std::string bytes) {
    std::string text;
    DrainUtf8(bytes, text);
    return text + "|" + std::to_string(bytes.size());
  };
  EXPECT_EQ(drain("a\xC3\xA9"), "aé|0");
  EXPECT_EQ(drain("\xC0\x80"), "\uFFFD\uFFFD|0");
  EXPECT_EQ(drain("\xE0\x80x"), "\uFFFD\uFFFDx|0");
  EXPECT_EQ(drain("\xED\xA0\x80"), "\uFFFD\uFFFD\uFFFD|0");
  EXPECT_EQ(drain("\xF0\x9F\x98x"), "\uFFFDx|0");
  EXPECT_EQ(drain("\xF0\x9F\x98"), "|3");
  EXPECT_EQ(drain("\xF4\x90"), "\uFFFD\uFFFD|0");
  EXPECT_EQ(drain("\xFF\x80"), "\uFFFD\uFFFD|0");
}

}  // namespace
}  // namespace tessera
