// `tessera bench kernels`: what each kernel does per second on this machine, by instruction set. Measures
// only; the tests hold the results.
#pragma once

#include <ostream>

namespace tessera::kernels {

// One thread, the calling one. For each kernel and each instruction set of this CPU a line: time of one call,
// Gop/s (a multiply-accumulate is two) or GB/s, and speed over the scalar reference. Takes some seconds.
void BenchKernels(std::ostream& out);

}  // namespace tessera::kernels
