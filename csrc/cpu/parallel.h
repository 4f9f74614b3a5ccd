// The loops of kernels over the threads of threads.h. Work is split by shape only, so results do
// not depend on the number of threads; a task that is already inside a parallel region runs
// serially. Compiled once per instruction set: here is what a kernel's body goes through, the rest
// is not.
#pragma once

#include <cstdint>

#include "threads.h"

namespace llmkern {
namespace LLMKERN_ISA {

// f(task, thread) for each task in [0, tasks): taken one by one, so uneven tasks balance. thread is
// below max_threads() as it was at the call. f must not throw.
template <class F>
static inline void parallel_for(int64_t tasks, const F& f) {
  const int threads = tasks > 1 ? max_threads() : 1;
  if (threads == 1) {
    for (int64_t t = 0; t < tasks; ++t) f(t, 0);
    return;
  }
  const Share share = [](const void* work, int64_t task, int64_t thread) noexcept {
    (*static_cast<const F*>(work))(task, static_cast<int>(thread));
  };
  share_tasks(tasks, threads, share, &f);
}

// f(begin, end) over [0, n) in one contiguous range a thread, none shorter than grain.
template <class F>
static inline void parallel_ranges(int64_t n, int64_t grain, const F& f) {
  int64_t ranges = grain > 0 ? n / grain : n;  // asking the runtime takes longer than a small call
  if (ranges > 1) {
    const int threads = max_threads();
    if (ranges > threads) ranges = threads;
  }
  if (ranges <= 1) {
    if (n > 0) f(int64_t{0}, n);
    return;
  }
  const Share share = [](const void* work, int64_t begin, int64_t end) noexcept {
    (*static_cast<const F*>(work))(begin, end);
  };
  share_ranges(n, ranges, share, &f);
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern
