// Streaming equals one-shot, for every way to cut every text in two and in three.
#include "text/output_parser.h"

#include <gtest/gtest.h>

#include <initializer_list>

namespace tessera {
namespace {

ParsedText Parse(bool enabled, std::initializer_list<std::string_view> pieces) {
  ReasoningParser parser(enabled);
  ParsedText all;
  const auto add = [&all](const ParsedText& part) {
    all.reasoning += part.reasoning;
    all.content += part.content;
  };
  for (const std::string_view piece : pieces) add(parser.Push(piece));
  add(parser.Finish());
  return all;
}

struct Example {
  std::string text, reasoning, content;
};
const Example kExamples[] = {
    {"", "", ""},
    {"thought</think>answer", "thought", "answer"},
    {"<think>thought</think>answer", "thought", "answer"},
    {"<think>\nthought\n</think>\n\nanswer", "\nthought\n", "\n\nanswer"},
    {"never ends", "never ends", ""},
    {"<think>", "", ""},
    {"<thin", "<thin", ""},
    {"<thinking</think>x", "<thinking", "x"},
    {"</think>", "", ""},
    {"<think></think>", "", ""},
    {"a</thin", "a</thin", ""},
    {"a</thin</think>b", "a</thin", "b"},
    {"a<</think>b", "a<", "b"},
    {"a</think>b</think>c<think>d", "a", "b</think>c<think>d"},
    {"<think><think>x</think>y", "<think>x", "y"},
    {" <think>x</think>y", " <think>x", "y"},
    {"想😀</think>答", "想😀", "答"},
};

TEST(ReasoningParser, SplitsTheWholeText) {
  for (const Example& example : kExamples) {
    const ParsedText parsed = Parse(true, {example.text});
    EXPECT_EQ(parsed.reasoning, example.reasoning) << example.text;
    EXPECT_EQ(parsed.content, example.content) << example.text;
  }
}

TEST(ReasoningParser, EveryCutGivesTheSame) {
  for (const Example& example : kExamples) {
    const std::string_view text = example.text;
    for (size_t first = 0; first <= text.size(); ++first) {
      for (size_t second = first; second <= text.size(); ++second) {
        const ParsedText parsed =
            Parse(true, {text.substr(0, first), text.substr(first, second - first), text.substr(second)});
        ASSERT_EQ(parsed.reasoning, example.reasoning) << text << " at " << first << ", " << second;
        ASSERT_EQ(parsed.content, example.content) << text << " at " << first << ", " << second;
      }
    }
    ReasoningParser parser(true);
    ParsedText bytewise;
    for (size_t i = 0; i < text.size(); ++i) {
      const ParsedText part = parser.Push(text.substr(i, 1));
      bytewise.reasoning += part.reasoning;
      bytewise.content += part.content;
    }
    bytewise.reasoning += parser.Finish().reasoning;
    EXPECT_EQ(bytewise.reasoning, example.reasoning) << text;
    EXPECT_EQ(bytewise.content, example.content) << text;
  }
}

TEST(ReasoningParser, AMarkerAloneYieldsNothingAndAnEndMarkerInsideYieldsBoth) {
  ReasoningParser parser(true);
  ParsedText part = parser.Push("<think>");
  EXPECT_EQ(part.reasoning + part.content, "");
  EXPECT_TRUE(parser.in_reasoning());
  part = parser.Push("a</think>b");
  EXPECT_EQ(part.reasoning, "a");
  EXPECT_EQ(part.content, "b");
  EXPECT_FALSE(parser.in_reasoning());
}

TEST(ReasoningParser, DisabledEverythingIsContent) {
  const ParsedText parsed = Parse(false, {"<think>a</th", "ink>b"});
  EXPECT_EQ(parsed.reasoning, "");
  EXPECT_EQ(parsed.content, "<think>a</think>b");
}

}  // namespace
}  // namespace tessera
