// Chooses the table of kernels by CPUID, rounds to bf16. No arithmetic of the forward pass: that is
// reference.cc and the instruction sets' own files.
#include "kernels/kernels.h"

#include <string>

#include "base/check.h"
#include "kernels/tables.h"

namespace tessera::kernels {
namespace {

constexpr Isa kAllIsas[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};

// What the CPU (and the operating system, which must save the registers) lacks for `isa`; empty when it can
// run it.
std::string Missing(Isa isa) {
  std::string missing;
  const auto need = [&](bool present, std::string_view name) {
    if (!present) missing += (missing.empty() ? "" : ", ") + std::string(name);
  };
  __builtin_cpu_init();
  need(__builtin_cpu_supports("fma"), "fma");
  if (isa == Isa::kScalar) return missing;
  need(__builtin_cpu_supports("avx2"), "avx2");
  if (isa == Isa::kAvx2) return missing;
  need(__builtin_cpu_supports("avx512f"), "avx512f");
  need(__builtin_cpu_supports("avx512bw"), "avx512bw");
  need(__builtin_cpu_supports("avx512dq"), "avx512dq");
  need(__builtin_cpu_supports("avx512vl"), "avx512vl");
  need(__builtin_cpu_supports("avx512vnni"), "avx512vnni");
  if (isa == Isa::kAvx512) return missing;
  need(__builtin_cpu_supports("avx512bf16"), "avx512bf16");
  return missing;
}

const Kernels& TableOf(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return kScalarTable;
    case Isa::kAvx2:
      return kAvx2Table;
    case Isa::kAvx512:
      return kAvx512Table;
    case Isa::kAvx512Bf16:
      return kAvx512Bf16Table;
  }
  CHECK(false);
}

}  // namespace

std::string_view IsaName(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512bf16";
  }
  CHECK(false);
}

Bf16 ToBf16(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > kInfinityBits) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  if (magnitude < 0x00800000) return {static_cast<uint16_t>(bits >> 16 & 0x8000)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

int64_t AttentionScratchBytes(int key_width, int value_width) {
  return AttentionScratch(key_width, value_width).size_bytes();
}

int64_t AttentionPartBytes(int value_width) {
  return AttentionPart::SizeBytes(value_width);
}

Result<const Kernels*> ForIsa(Isa isa) {
  if (const std::string missing = Missing(isa); !missing.empty()) {
    return Invalid("instruction set '{}' is not there: this CPU lacks {}", IsaName(isa), missing);
  }
  return &TableOf(isa);
}

Result<const Kernels*> Choose(std::string_view forced) {
  if (forced.empty()) {
    Isa best = Isa::kScalar;
    for (const Isa isa : kAllIsas) {
      if (Missing(isa).empty()) best = isa;
    }
    return ForIsa(best);
  }
  for (const Isa isa : kAllIsas) {
    if (forced == IsaName(isa)) return ForIsa(isa);
  }
  return Invalid("TESSERA_ISA is '{}'; wanted one of scalar, avx2, avx512, avx512bf16", forced);
}

}  // namespace tessera::kernels
