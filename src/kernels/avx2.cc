// The kernels for AVX2 + FMA: the shared sources compiled for 8 lanes. Nothing of its own.
#include <cstddef>
#include <cstdint>

#include "kernels/kernels.h"
#include "kernels/tables.h"
#include "kernels/target.h"

TESSERA_TARGET_PUSH("avx2,fma")

namespace tessera::kernels {
namespace avx2 {
namespace {

#include "kernels/simd_avx2.h"

#include "kernels/simd_pairs_widened.h"

#include "kernels/elementwise-inl.h"
#include "kernels/gemm-inl.h"

#include "kernels/attention-inl.h"
#include "kernels/table-inl.h"

}  // namespace
}  // namespace avx2

constinit const Kernels kAvx2Table = avx2::TableFor(Isa::kAvx2);

}  // namespace tessera::kernels

TESSERA_TARGET_POP
