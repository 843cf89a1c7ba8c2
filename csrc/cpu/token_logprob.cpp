// Scratch of token_logprob; the kernel is in kernels/token_logprob.cpp.
#include "ttskernels/token_logprob.h"

#include "ttskernels/linear.h"
#include "ttskernels/threads.h"

namespace ttsk {

int64_t TokenLogprobScratchBytes(const TokenLogprobParams& p) {
  const int64_t panels = p.packed ? 0 : NumThreads() * LinearPackedBytes(kPanelColumns, p.dim, p.weight_dtype);
  return panels + p.num_rows * ((p.dim + 1) / 2 * 2 + 2 * kLogprobSlices) * 4;
}

}  // namespace ttsk
