// The kernels for AVX-512 with VNNI and bf16 dot products: the shared sources compiled for 16 lanes.
#include <cstddef>
#include <cstdint>

#include "kernels/kernels.h"
#include "kernels/tables.h"
#include "kernels/target.h"

TESSERA_TARGET_PUSH("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")

namespace tessera::kernels {
namespace avx512bf16 {
namespace {

#include "kernels/simd_avx512.h"

#include "kernels/simd_pairs_dot.h"

#include "kernels/elementwise-inl.h"
#include "kernels/gemm-inl.h"

#include "kernels/attention-inl.h"
#include "kernels/table-inl.h"

}  // namespace
}  // namespace avx512bf16

constinit const Kernels kAvx512Bf16Table = avx512bf16::TableFor(Isa::kAvx512Bf16);

}  // namespace tessera::kernels

TESSERA_TARGET_POP
