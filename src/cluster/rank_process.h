// A rank as a process of its own, child of a node agent: `tessera rank R dp D tp T`. What it is told comes
// over the link that it inherits.
#pragma once

namespace tessera {

// Serves until the agent says stop or is gone; the exit code of the process.
int RunRankProcess();

}  // namespace tessera
