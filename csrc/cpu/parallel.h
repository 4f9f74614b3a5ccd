// Loops over the OpenMP pool that torch uses. Work is split by shape only, so results do not depend
// on the number of threads; a task that is already inside a parallel region runs serially.
#pragma once

#include <omp.h>

#include <cstdint>

namespace llmkern {
namespace LLMKERN_ISA {

static inline int max_threads() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

// f(task, thread) for each task in [0, tasks): taken one by one, so uneven tasks balance. thread is
// below max_threads() as it was at the call.
template <class F>
static inline void parallel_for(int64_t tasks, const F& f) {
  const int threads = max_threads();
  if (threads == 1 || tasks <= 1) {
    for (int64_t t = 0; t < tasks; ++t) f(t, 0);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t t = 0; t < tasks; ++t) f(t, omp_get_thread_num());
}

// f(begin, end) over [0, n) in one contiguous range a thread, none shorter than grain.
template <class F>
static inline void parallel_ranges(int64_t n, int64_t grain, const F& f) {
  int64_t ranges = grain > 0 ? n / grain : n;  // asking OpenMP takes longer than a small call
  if (ranges > 1 && ranges > max_threads()) ranges = max_threads();
  if (ranges <= 1) {
    if (n > 0) f(int64_t{0}, n);
    return;
  }
#pragma omp parallel for schedule(static, 1) num_threads(ranges)
  for (int64_t r = 0; r < ranges; ++r) f(n * r / ranges, n * (r + 1) / ranges);
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern
