// The tables of kernels.cc's choice, one per instruction set, and the scalar numbers that every table shares.
// Inside the room only: callers use kernels.h.
#pragma once

#include "kernels/kernels.h"

namespace tessera::kernels {

extern const Kernels kScalarTable;
extern const Kernels kAvx2Table;
extern const Kernels kAvx512Table;
extern const Kernels kAvx512Bf16Table;

// What a block of a tile gives before it is merged, in memory of SizeBytes: output [row][padded value], then
// maximum and sum of each row; rows are padded to kAttentionRows.
struct AttentionPart {
  AttentionPart(void* at, int value_width)
      : output(static_cast<float*>(at)),
        m(output + int64_t{kAttentionRows} * Pad(value_width)),
        l(m + kAttentionRows) {}
  // One that is only read.
  AttentionPart(const void* at, int value_width) : AttentionPart(const_cast<void*>(at), value_width) {}
  static int Pad(int value_width) { return (value_width + 15) / 16 * 16; }
  static int64_t SizeBytes(int value_width) { return int64_t{kAttentionRows} * (Pad(value_width) + 2) * 4; }

  float* output;
  float* m;
  float* l;
};

// Where Attention keeps what it works on, in bytes from the start of the scratch: the same for every
// instruction set. Query rows lie in vector lanes and are padded to kAttentionRows. Pairs are bf16 words or
// two fp32 values, as the instruction set wants them: there is room for fp32.
struct AttentionScratch {
  static constexpr int kTilePositions = 48;                  // whose keys are laid out at a time
  static constexpr int kPaddedBlock = kAttentionBlock + 16;  // positions: groups of them are whole
  static constexpr int kPanelBytes = 18 * 1024;              // of the 32 KiB of L1, for what stays there
  static constexpr int kSlabBytes = 200 * 1024;  // of the values that are laid out at a time: of L2

  AttentionScratch(int key_width, int the_value_width)
      : value_width(the_value_width),
        padded_value(AttentionPart::Pad(value_width)),
        padded_key((key_width + 15) / 16 * 16),
        query_pairs((key_width + 1) / 2) {}

  int value_width;
  int padded_value;
  int padded_key;
  int query_pairs;
  // [panel of rows][pair][row] pairs
  int64_t queries() const { return 0; }
  // [row vector][position][lane] fp32, then probabilities
  int64_t scores() const { return queries() + int64_t{query_pairs} * kAttentionRows * 8; }
  // keys: [position][padded_key]; values: [position / 2][column] pairs
  int64_t rows() const { return scores() + int64_t{kPaddedBlock} * kAttentionRows * 4; }
  // The parts: of a block, and merged over blocks.
  int64_t block() const { return rows() + (KeyBytes() > kSlabBytes ? KeyBytes() : kSlabBytes); }
  int64_t merged() const { return block() + AttentionPart::SizeBytes(value_width); }
  int64_t size_bytes() const { return merged() + AttentionPart::SizeBytes(value_width); }

 private:
  int64_t KeyBytes() const { return int64_t{kTilePositions} * padded_key * 4; }
};

// exp and log by the canonical polynomials, one value at a time (reference.cc; the CPU has FMA).
float ScalarExp(float x);
float ScalarLog(float x);

}  // namespace tessera::kernels
