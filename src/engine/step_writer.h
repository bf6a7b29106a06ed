// From a sequence to its part of a step: tokens, pages, wanted logits, and everything that decides its next
// draw. It chooses nothing: how many tokens of which sequence is the scheduler's.
#pragma once

#include "engine/sequence.h"
#include "model/step.h"

namespace tessera {

// Empties all arrays and keeps their memory.
void ClearGroupStep(GroupStep& step);

// Appends tokens [num_computed, num_computed + num_tokens) of the sequence. Logits are wanted at the last
// known token (a draw) and wherever a prompt logprob is owed. REQUIRES: `sequence.blocks` covers these
// positions.
void AppendSlice(const Sequence& sequence, int num_tokens, GroupStep& step);

}  // namespace tessera
