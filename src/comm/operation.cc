// Names and comparisons of collective operations, for messages.
#include "comm/operation.h"

#include "base/format.h"

namespace tessera {

std::string_view CollectiveName(Collective collective) {
  switch (collective) {
    case Collective::kAllReduce:
      return "all_reduce";
    case Collective::kReduceScatter:
      return "reduce_scatter";
    case Collective::kAllGather:
      return "all_gather";
    case Collective::kAllToAll:
      return "all_to_all";
    case Collective::kBroadcast:
      return "broadcast";
    case Collective::kBarrier:
      return "barrier";
  }
  return "an unknown operation";
}

std::string Operation::Text() const {
  const auto kind = static_cast<Collective>(collective);
  std::string text = Format("{} #{}", CollectiveName(kind), sequence);
  if (kind != Collective::kBarrier && kind != Collective::kAllToAll) text += Format(" of {} bytes", bytes);
  if (kind == Collective::kBroadcast) text += Format(" from member {}", root);
  return text;
}

uint64_t HashSizes(std::span<const int64_t> sizes) {
  uint64_t hash = 0xCBF29CE484222325;
  for (const int64_t size : sizes) hash = (hash ^ static_cast<uint64_t>(size)) * 0x100000001B3;
  return hash;
}

std::string MismatchText(int rank_a, const Operation& a, int rank_b, const Operation& b) {
  const bool only_parts = a.Text() == b.Text();
  return Format("the ranks disagree: rank {} is at {}, rank {} at {}{}", rank_a, a.Text(), rank_b, b.Text(),
                only_parts ? Format(", but the sizes of its parts differ (hash {:x} against {:x})",
                                    a.sizes_hash, b.sizes_hash)
                           : "");
}

}  // namespace tessera
