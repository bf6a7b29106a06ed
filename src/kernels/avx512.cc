// The kernels for AVX-512 with VNNI but without bf16 instructions: the shared sources compiled for 16 lanes.
#include <cstddef>
#include <cstdint>

#include "kernels/kernels.h"
#include "kernels/tables.h"
#include "kernels/target.h"

TESSERA_TARGET_PUSH("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")

namespace tessera::kernels {
namespace avx512 {
namespace {

#include "kernels/simd_avx512.h"

#include "kernels/simd_pairs_widened.h"

#include "kernels/elementwise-inl.h"
#include "kernels/gemm-inl.h"

#include "kernels/attention-inl.h"
#include "kernels/table-inl.h"

}  // namespace
}  // namespace avx512

constinit const Kernels kAvx512Table = avx512::TableFor(Isa::kAvx512);

}  // namespace tessera::kernels

TESSERA_TARGET_POP
