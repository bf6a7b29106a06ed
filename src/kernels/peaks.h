// What this machine can do at most, measured: how fast it reads memory and multiplies. `tessera bench
// kernels` holds the kernels against it. No kernel's arithmetic is here.
#pragma once

#include <cstddef>
#include <span>

#include "base/threads.h"
#include "kernels/kernels.h"

namespace tessera::kernels {

// Multiply-accumulates in registers, two operations each, in 10^9 per second, of all threads of a pool. The
// mix of instructions is that of the table's kernels; 0 where it has none of that kind (scalar).
struct MultiplyPeaks {
  double int8 = 0;
  double bf16 = 0;
  double fp32 = 0;
};
// REQUIRES: the CPU has `isa`. Takes about 0.1 s.
MultiplyPeaks MeasureMultiply(Isa isa, ThreadPool& threads);

// 10^9 bytes per second that all threads of a pool read together, each a stretch of `memory`, several times;
// the best pass. Larger than the caches, it is the rate of memory; a few KiB, that of the first cache. 0 on a
// CPU without AVX2.
double MeasureRead(std::span<const std::byte> memory, ThreadPool& threads);

// One pass of the calling thread over part `part` of `parts` equal ones of `memory`, less than 256 bytes of
// each aside, in one stream or two: which is faster depends on the prefetchers. Returns what depends on every
// byte read, so that none is left out. REQUIRES: a CPU with AVX2.
int ReadPart(std::span<const std::byte> memory, int part, int parts, int num_streams);

}  // namespace tessera::kernels
