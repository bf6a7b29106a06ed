// The tables of kernels.cc's choice, one per instruction set, and the scalar numbers that every table shares.
// Inside the room only: callers use kernels.h.
#pragma once

#include "kernels/kernels.h"

namespace tessera::kernels {

extern const Kernels kScalarTable;
extern const Kernels kAvx2Table;
extern const Kernels kAvx512Table;
extern const Kernels kAvx512Bf16Table;

// Where Attention keeps its parts, in bytes from the start of the scratch: the same for every instruction
// set. Query rows lie in vector lanes and are padded to kAttentionRows. Pairs are bf16 words or two fp32
// values, as the instruction set wants them: there is room for fp32.
struct AttentionScratch {
  static constexpr int kTilePositions = 48;  // cache positions whose rows are laid out at a time

  AttentionScratch(int latent, int rope)
      : padded_latent((latent + 15) / 16 * 16),
        padded_width((latent + rope + 15) / 16 * 16),
        query_pairs((latent + rope) / 2) {}

  int padded_latent;
  int padded_width;
  int query_pairs;
  // [pair][row] pairs
  int64_t queries() const { return 0; }
  // [row vector][position][lane] fp32
  int64_t scores() const { return queries() + int64_t{query_pairs} * kAttentionRows * 8; }
  // [row vector][position / 2][lane] pairs
  int64_t probabilities() const { return scores() + int64_t{kAttentionBlock} * kAttentionRows * 4; }
  // keys: [position][padded_width]; values: [position / 2][padded_width] pairs
  int64_t rows() const { return probabilities() + int64_t{kAttentionBlock} * kAttentionRows * 4; }
  // [row][padded_latent] fp32: of the block, and merged over blocks
  int64_t block_output() const { return rows() + int64_t{kTilePositions} * padded_width * 4; }
  int64_t output() const { return block_output() + int64_t{kAttentionRows} * padded_latent * 4; }
  int64_t size_bytes() const { return output() + int64_t{kAttentionRows} * padded_latent * 4; }
};

// exp and log by the canonical polynomials, one value at a time (reference.cc; the CPU has FMA).
float ScalarExp(float x);
float ScalarLog(float x);

}  // namespace tessera::kernels
