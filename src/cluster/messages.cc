// Every message is written and read by one function, `Visit`, so that both sides cannot disagree.
#include "cluster/messages.h"

#include <algorithm>

#include "base/bytes.h"

namespace tessera {
namespace {

struct Writing {
  ByteWriter out;
  template <Plain T>
  void operator()(T& value) {
    out.Write(value);
  }
  void operator()(std::string& text) { out.WriteText(text); }
  template <Plain T>
  void operator()(std::vector<T>& values) {
    out.WriteArray(values);
  }
  template <typename T, typename Each>
  void List(std::vector<T>& values, size_t, const Each& each) {
    out.Write(static_cast<uint64_t>(values.size()));
    for (T& value : values) each(*this, value);
  }
};

struct Reading {
  ByteReader in;
  template <Plain T>
  void operator()(T& value) {
    value = in.Read<T>();
  }
  void operator()(bool& value) { value = in.Read<uint8_t>() != 0; }
  void operator()(std::string& text) { text = in.ReadText(); }
  template <Plain T>
  void operator()(std::vector<T>& values) {
    values = in.ReadArray<T>();
  }
  // An element takes at least `min_bytes`.
  template <typename T, typename Each>
  void List(std::vector<T>& values, size_t min_bytes, const Each& each) {
    const uint64_t count = in.ReadCount(min_bytes);
    for (uint64_t i = 0; i < count && in.ok(); ++i) each(*this, values.emplace_back());
  }
};

const auto kText = [](auto& io, std::string& text) { io(text); };

template <typename Io>
void Visit(Io& io, Hello& hello) {
  io(hello.first_rank);
  io(hello.num_ranks);
  io(hello.process);
  io(hello.name);
  io(hello.data_address);
  io.List(hello.agreement, 16, [](auto& each, std::pair<std::string, std::string>& item) {
    each(item.first);
    each(item.second);
  });
}

template <typename Io>
void Visit(Io& io, Welcome& welcome) {
  io(welcome.cluster);
  io(welcome.epoch);
}

template <typename Io>
void Visit(Io& io, RankSetup& setup) {
  io(setup.model);
  io(setup.quantization);
  io(setup.degrees);
  io(setup.rank);
  io(setup.split_embedding);
  io(setup.block_size);
  io(setup.max_model_len);
  io(setup.num_tokens);
  io(setup.local_rank);
  io(setup.num_local);
  io(setup.threads);
  io(setup.decode_threads);
  io(setup.cores);
  io(setup.isa);
  io(setup.log_level);
  io(setup.node_of_rank);
  io(setup.data_address);
  io(setup.secret);
  io(setup.epoch);
  io(setup.deadline_ms);
}

template <typename Io>
void Visit(Io& io, RankLoaded& loaded) {
  io(loaded.weight_bytes);
  io(loaded.memory_bytes);
  io(loaded.isa);
}

template <typename Io>
void Visit(Io& io, RankReport& report) {
  io.List(report.output.rows, 20, [](auto& each, RankOutput::Row& row) {
    each(row.index);
    each(row.output.token);
    each(row.output.logprob);
    each(row.output.top);
  });
  io.List(report.output.failures, 8, kText);
  io(report.counts);
}

template <typename Io>
void Visit(Io& io, Step& step) {
  io(step.number);
  io.List(step.groups, 80, [](auto& each, GroupStep& group) {
    each(group.zero_blocks);
    each(group.tokens);
    each(group.sequences);
    each(group.block_ids);
    each(group.rows);
    each(group.sampling);
    each(group.counts);
    each(group.biases);
    each(group.token_lists);
    each(group.masks);
  });
}

template <typename Io>
void Visit(Io& io, std::vector<std::string>& texts) {
  io.List(texts, 8, kText);
}

template <typename Message>
std::vector<std::byte> EncodeMessage(const Message& message) {
  Writing writing;
  Visit(writing, const_cast<Message&>(message));  // Writing changes nothing
  return writing.out.Take();
}

template <typename Message>
Result<Message> DecodeMessage(std::span<const std::byte> bytes, std::string_view what) {
  Reading reading{ByteReader(bytes)};
  Message message{};
  Visit(reading, message);
  RETURN_IF_ERROR(reading.in.Finish(what));
  return message;
}

}  // namespace

Status CompareAgreements(const Agreement& head, const Agreement& node) {
  for (size_t i = 0; i < std::max(head.size(), node.size()); ++i) {
    const bool both = i < head.size() && i < node.size() && head[i].first == node[i].first;
    if (!both) return Invalid("the head and this node are of different versions");
    if (head[i].second == node[i].second) continue;
    return Invalid("{} differs: '{}' on the head, '{}' on the node", head[i].first, head[i].second,
                   node[i].second);
  }
  return {};
}

std::vector<std::byte> Encode(const Hello& hello) {
  return EncodeMessage(hello);
}
std::vector<std::byte> Encode(const Welcome& welcome) {
  return EncodeMessage(welcome);
}
std::vector<std::byte> Encode(const RankSetup& setup) {
  return EncodeMessage(setup);
}
std::vector<std::byte> Encode(const RankLoaded& loaded) {
  return EncodeMessage(loaded);
}
std::vector<std::byte> Encode(const RankReport& report) {
  return EncodeMessage(report);
}
std::vector<std::byte> Encode(const Step& step) {
  return EncodeMessage(step);
}
std::vector<std::byte> Encode(const std::vector<std::string>& texts) {
  return EncodeMessage(texts);
}
std::vector<std::byte> EncodeText(std::string_view text) {
  const auto bytes = std::as_bytes(std::span(text));
  return {bytes.begin(), bytes.end()};
}

Result<Hello> DecodeHello(std::span<const std::byte> bytes) {
  return DecodeMessage<Hello>(bytes, "a node's hello");
}
Result<Welcome> DecodeWelcome(std::span<const std::byte> bytes) {
  return DecodeMessage<Welcome>(bytes, "the head's welcome");
}
Result<RankSetup> DecodeRankSetup(std::span<const std::byte> bytes) {
  return DecodeMessage<RankSetup>(bytes, "a rank's setup");
}
Result<RankLoaded> DecodeRankLoaded(std::span<const std::byte> bytes) {
  return DecodeMessage<RankLoaded>(bytes, "a rank's load report");
}
Result<RankReport> DecodeRankReport(std::span<const std::byte> bytes) {
  return DecodeMessage<RankReport>(bytes, "a rank's output");
}
Result<Step> DecodeStep(std::span<const std::byte> bytes) {
  return DecodeMessage<Step>(bytes, "a step");
}
Result<std::vector<std::string>> DecodeTexts(std::span<const std::byte> bytes) {
  return DecodeMessage<std::vector<std::string>>(bytes, "a list of texts");
}
Result<std::string> DecodeText(std::span<const std::byte> bytes) {
  const auto* text = reinterpret_cast<const char*>(bytes.data());
  return std::string(text, bytes.size());
}

}  // namespace tessera
