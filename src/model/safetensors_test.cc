// The container: valid files give their tensors, every kind of hostile header is refused with file and
// reason.
#include "model/safetensors.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>

namespace tessera {
namespace {

std::string Head(std::string_view json, uint64_t declared) {
  std::string head(8, '\0');
  for (size_t i = 0; i < 8; ++i) head[i] = static_cast<char>(declared >> (8 * i));
  return head + std::string(json);
}
std::string Head(std::string_view json) {
  return Head(json, json.size());
}

auto Parse(std::string_view json, uint64_t data_bytes) {
  return ParseSafetensorsHeader(Head(json), 8 + json.size() + data_bytes, "x.safetensors");
}

TEST(SafetensorsTest, GivesEntries) {
  const std::string json =
      R"({"__metadata__": {"format": "pt"}, "b": {"dtype": "I8", "shape": [3], "data_offsets": [24, 27]},)"
      R"( "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},)"
      R"( "none": {"dtype": "BF16", "shape": [0, 5], "data_offsets": [24, 24]}}   )";
  const auto tensors = Parse(json, 27);
  ASSERT_TRUE(tensors) << tensors.error().message;
  ASSERT_EQ(tensors->size(), 3u);
  const TensorEntry& entry = tensors->find("a.weight")->second;
  EXPECT_EQ(entry.dtype, Dtype::kFp32);
  EXPECT_EQ(entry.shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(entry.begin, 8 + json.size());
  EXPECT_EQ(entry.end, 8 + json.size() + 24);
  EXPECT_EQ(entry.file, "x.safetensors");
  EXPECT_EQ(tensors->find("b")->second.begin, 8 + json.size() + 24);
}

TEST(SafetensorsTest, RefusesHostileHeaders) {
  struct Hostile {
    const char* json;
    uint64_t data_bytes;
    const char* message;
  };
  const Hostile hostile[] = {
      {R"([1])", 0, "does not begin with '{'"},
      {R"({"a": )", 0, "not valid JSON"},
      {R"({"a": 1})", 0, "tensor a: is 1, an object is wanted"},
      {R"({"a": {"dtype": "F32", "shape": [1]}})", 4, "exactly dtype, shape and data_offsets"},
      {R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "x": 1}})", 4, "exactly dtype"},
      {R"({"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}})", 8,
       "dtype \"F64\" is not supported"},
      {R"({"a": {"dtype": 5, "shape": [1], "data_offsets": [0, 4]}})", 4, "dtype 5 is not supported"},
      {R"({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}})", 4, "shape holds -1"},
      {R"({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}})", 4, "shape holds 1"},
      {R"({"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}})", 4, "shape is 1"},
      {R"({"a": {"dtype": "F32", "shape": [1,1,1,1,1,1,1,1,1], "data_offsets": [0, 4]}})", 4,
       "an array of 9"},
      {R"({"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 4]}})", 4,
       "overflows"},
      {R"({"a": {"dtype": "F32", "shape": [4611686018427387905], "data_offsets": [0, 4]}})", 4, "overflows"},
      {R"({"a": {"dtype": "F32", "shape": [18446744073709551617], "data_offsets": [0, 4]}})", 4, ""},
      {R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}})", 4, "data_offsets must be two"},
      {R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}})", 4, "data_offsets must be two"},
      {R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}})", 4,
       "do not lie in the file's 4 bytes"},
      {R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})", 3,
       "do not lie in the file's 3 bytes"},
      {R"({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}})", 4,
       "span 4 bytes, F32 of shape [2] takes 8"},
      {R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})", 5,
       "end at byte 4 of the data, the file holds 5"},
      {R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]}})", 5, "bytes 0 to 1 of the data"},
      {R"({"a": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}, "b": {"dtype": "I8", "shape": [3],)"
       R"( "data_offsets": [3, 6]}})",
       6, "tensor b begins at byte 3 of the data, inside the tensor before it"},
      {R"({"a": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}, "a": {"dtype": "I8", "shape": [1],)"
       R"( "data_offsets": [0, 1]}})",
       1, "duplicate"},
      {R"({"": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}})", 1, "tensor name"},
      {R"({"a\nb": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}})", 1, "tensor name \"a?b\""},
      {R"({"__metadata__": []})", 0, "__metadata__"},
      {R"({"__metadata__": {"a": 1}})", 0, "__metadata__.a is 1"},
      {R"({"__metadata__": {"a": "int4"}, "a": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}})", 1,
       "marks packed int4"},
  };
  for (const Hostile& file : hostile) {
    const auto tensors = Parse(file.json, file.data_bytes);
    ASSERT_FALSE(tensors) << file.json;
    EXPECT_EQ(tensors.error().kind, ErrorKind::kInvalid);
    EXPECT_EQ(tensors.error().message.find("x.safetensors"), 0u) << tensors.error().message;
    EXPECT_NE(tensors.error().message.find(file.message), std::string::npos)
        << file.json << " gave: " << tensors.error().message;
  }
}

TEST(SafetensorsTest, RefusesHostileLengths) {
  const auto parse = [](const std::string& head, uint64_t file_bytes) {
    const auto tensors = ParseSafetensorsHeader(head, file_bytes, "x");
    return tensors ? std::string("accepted") : tensors.error().message;
  };
  EXPECT_EQ(parse("", 0), "x: 0 bytes are too few for a safetensors file");
  EXPECT_EQ(parse("1234567", 7), "x: 7 bytes are too few for a safetensors file");
  EXPECT_EQ(parse(Head("{}", 3), 10), "x: a header of 3 bytes, but the file has 10");
  EXPECT_EQ(parse(Head("{}", ~uint64_t{0}), 10),
            "x: a header of 18446744073709551615 bytes, at most 104857600 are accepted");
  EXPECT_EQ(parse(Head("{}", 20), 100), "x: the header ends after 2 of 20 bytes");
  EXPECT_EQ(parse(Head("{}"), 10), "accepted");
  EXPECT_NE(parse(Head(std::string("{}\0x", 4)), 12).find("NUL"), std::string::npos);
  const std::string deep = "{\"a\":" + std::string(1'000'000, '[');
  EXPECT_NE(parse(Head(deep), 8 + deep.size()).find("x"), std::string::npos);
}

class SafetensorsFileTest : public ::testing::Test {
 protected:
  SafetensorsFileTest() {
    std::string pattern = ::testing::TempDir() + "safetensors_XXXXXX";
    folder_ = mkdtemp(pattern.data());
  }
  ~SafetensorsFileTest() override { std::filesystem::remove_all(folder_); }
  std::string Put(const std::string& content) {
    EXPECT_TRUE(WriteFile(folder_ + "/f.safetensors", content));
    return folder_ + "/f.safetensors";
  }
  std::string folder_;
};

TEST_F(SafetensorsFileTest, ReadsWholeTensorsAndParts) {
  const std::string json = R"({"a": {"dtype": "I8", "shape": [4], "data_offsets": [2, 6]},)"
                           R"( "b": {"dtype": "I8", "shape": [2], "data_offsets": [0, 2]}})";
  const auto file = SafetensorsFile::Open(Put(Head(json) + "bbaxyz"));
  ASSERT_TRUE(file) << file.error().message;
  const TensorEntry& entry = file->tensors().at("a");
  std::string content(4, '?');
  ASSERT_TRUE(file->Read(entry, std::as_writable_bytes(std::span(content))));
  EXPECT_EQ(content, "axyz");
  content.resize(2);
  ASSERT_TRUE(file->ReadPart(entry, 2, std::as_writable_bytes(std::span(content))));
  EXPECT_EQ(content, "yz");
}

TEST_F(SafetensorsFileTest, NoticesTruncation) {
  const std::string json = R"({"a": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}})";
  EXPECT_FALSE(SafetensorsFile::Open(Put(Head(json) + "abc")));  // before it is opened
  const std::string path = Put(Head(json) + "abcd");
  const auto file = SafetensorsFile::Open(path);
  ASSERT_TRUE(file);
  std::filesystem::resize_file(path, 8 + json.size() + 1);  // and after
  std::string content(4, '?');
  const Status status = file->Read(file->tensors().at("a"), std::as_writable_bytes(std::span(content)));
  ASSERT_FALSE(status);
  EXPECT_NE(status.error().message.find(path), std::string::npos);
  EXPECT_FALSE(SafetensorsFile::Open(Put("")));
  EXPECT_FALSE(SafetensorsFile::Open(folder_ + "/none"));
  EXPECT_FALSE(SafetensorsFile::Open(folder_));
}

}  // namespace
}  // namespace tessera
