// Size of the OpenMP team that every kernel uses. Torch-free.
#pragma once

namespace ttsk {

// TTSK_NUM_THREADS if set, else OMP's default, until SetNumThreads. Results never depend on it.
int NumThreads();
void SetNumThreads(int threads);

}  // namespace ttsk
