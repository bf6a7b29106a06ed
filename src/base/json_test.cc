// The strict reader refuses what parsers usually let through; the writers restore what they wrote.
#include "base/json.h"

#include <gtest/gtest.h>

#include <bit>
#include <charconv>
#include <cmath>
#include <limits>

#include "base/random.h"

namespace tessera {
namespace {

std::string RoundTrip(std::string_view text) {
  const auto value = ParseJson(text);
  if (!value) return "error: " + value.error().message;
  std::string out;
  AppendJson(out, *value);
  return out;
}

TEST(JsonTest, KeepsValuesAndTheirOrder) {
  EXPECT_EQ(RoundTrip(R"( {"b": [1, -2, 3.5, true, null], "a": {"x": "\u00e9\n\"\u0000"}} )"),
            "{\"b\":[1,-2,3.5,true,null],\"a\":{\"x\":\"\xC3\xA9\\n\\\"\\u0000\"}}");
  EXPECT_EQ(RoundTrip("18446744073709551615"), "18446744073709551615");
  EXPECT_EQ(RoundTrip("-9223372036854775808"), "-9223372036854775808");
  EXPECT_EQ(RoundTrip("\"\\ud83d\\ude00\""), "\"\xF0\x9F\x98\x80\"");
}

TEST(JsonTest, RefusesWhatIsNotStrictJson) {
  using namespace std::string_view_literals;
  for (std::string_view text : {""sv,
                                "{"sv,
                                "{}x"sv,
                                "[1,]"sv,
                                "{\"a\":1,}"sv,
                                "NaN"sv,
                                "Infinity"sv,
                                "-Infinity"sv,
                                "1e999"sv,
                                "\xEF\xBB\xBF{}"sv,
                                "{}\0"sv,
                                "\"a\0b\""sv,
                                "\"\xFF\""sv,
                                "\"\xC0\x80\""sv,
                                "\"\xED\xA0\x80\""sv,
                                "\"\\ud800\""sv,
                                "\"\\udc00\""sv,
                                "01"sv,
                                "+1"sv,
                                ".5"sv,
                                "'a'"sv,
                                "/*c*/1"sv,
                                "\"a\nb\""sv}) {
    EXPECT_FALSE(ParseJson(text)) << text;
  }
}

TEST(JsonTest, RefusesDuplicateKeysAtAnyDepth) {
  EXPECT_EQ(RoundTrip(R"({"a":1,"b":2,"a":3})"), "error: an object has a duplicate key");
  EXPECT_EQ(RoundTrip(R"([{"x":{"a":1,"\u0061":3}}])"), "error: an object has a duplicate key");
}

TEST(JsonTest, RefusesIntegersBeyond64Bits) {
  EXPECT_EQ(RoundTrip("18446744073709551616"), "error: an integer does not fit in 64 bits");
  EXPECT_EQ(RoundTrip("-9223372036854775809"), "error: an integer does not fit in 64 bits");
  EXPECT_EQ(RoundTrip("1e19"), "1e+19");
}

TEST(JsonTest, LimitsDepthAndCount) {
  const auto nested = [](size_t depth) { return std::string(depth, '[') + std::string(depth, ']'); };
  EXPECT_TRUE(ParseJson(nested(64)));
  EXPECT_FALSE(ParseJson(nested(65)));
  const auto deep = ParseJson(std::string(1000000, '['));
  ASSERT_FALSE(deep);
  EXPECT_EQ(deep.error().message, "nested deeper than 64 levels");
  EXPECT_FALSE(ParseJson("[1,2,3]", {.max_depth = 4, .max_values = 3}));
  EXPECT_TRUE(ParseJson("[1,2,3]", {.max_depth = 4, .max_values = 4}));
}

TEST(JsonTest, LogprobTextRestoresEveryBit) {
  RandomStream random(7);
  for (int i = 0; i < 20000; ++i) {
    const float value = -std::exp(random.Unit() * 20 - 11);
    std::string text;
    AppendLogprob(text, value);
    float back = 0;
    const auto end = std::from_chars(text.data(), text.data() + text.size(), back);
    ASSERT_EQ(end.ptr, text.data() + text.size());
    if (value >= -9999) {
      ASSERT_EQ(std::bit_cast<uint32_t>(back), std::bit_cast<uint32_t>(value)) << text;
    }
  }
  std::string text;
  AppendLogprob(text, -std::numeric_limits<float>::infinity());
  AppendLogprob(text += ' ', 0.0F);
  AppendLogprob(text += ' ', std::nanf(""));
  EXPECT_EQ(text, "-9999.0 0.0 -9999.0");
}

TEST(JsonTest, FloatTextLooksLikePython) {
  EXPECT_EQ(FloatText(5), "5.0");
  EXPECT_EQ(FloatText(-0.2), "-0.2");
}

TEST(JsonTest, RepairsBrokenUtf8) {
  EXPECT_EQ(RepairUtf8("a\xE4\xBD"), "a\xEF\xBF\xBD");
  EXPECT_EQ(RepairUtf8("\xE4\xBD\xA0"), "\xE4\xBD\xA0");
  EXPECT_EQ(RepairUtf8("\xFF\xFF"
                       "b"),
            "\xEF\xBF\xBD\xEF\xBF\xBD"
            "b");
  EXPECT_TRUE(IsUtf8(RepairUtf8("\xED\xA0\x80\xF4\x90\x80\x80")));
}

}  // namespace
}  // namespace tessera
