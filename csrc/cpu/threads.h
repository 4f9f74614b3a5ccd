// The threads that kernels run on: those of the OpenMP runtime that torch uses, entered through
// addresses that llmkern/backends/cpu/_threads.py finds in the process. Nothing is compiled or
// linked against a runtime: the same binary serves libgomp, libiomp5 and libomp, there is one pool,
// and torch.set_num_threads rules. Without a runtime everything runs on the calling thread.
// No part of this is compiled for one instruction set; parallel.h has the loops that kernels use.
#pragma once

#include <cstdint>

namespace llmkern {

// Entry points by their names in the runtime. The ways into a region come as GCC's call it or,
// where that is null, as clang's do.
struct ThreadRuntime {
  int (*omp_in_parallel)();
  int (*omp_get_max_threads)();
  int (*omp_get_thread_num)();
  int (*omp_get_num_threads)();
  void (*GOMP_parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
  void (*kmpc_fork_call)(void* location, int32_t arguments, void (*body)(), ...);
  void (*kmpc_push_num_threads)(void* location, int32_t thread, int32_t threads);
  int32_t (*kmpc_global_thread_num)(void* location);
  // torch keeps its number of threads for each thread of the program, and hands it to the runtime
  // when its own code first asks there: called once in each thread, before the runtime is asked.
  void (*in_new_thread)();
};

// All null: one thread. Not while kernels run.
void use_threads(const ThreadRuntime& runtime);

// How many threads a region entered here may have; 1 inside a region.
int max_threads();

// One share of the work: (what was handed over, first, second). An exception ends the process: none
// can cross a runtime written in C.
using Share = void (*)(const void* work, int64_t first, int64_t second) noexcept;

// share(work, task, thread) for each task in [0, tasks): taken one by one, so uneven tasks balance.
// thread is in [0, threads).
void share_tasks(int64_t tasks, int threads, Share share, const void* work);

// share(work, begin, end) for `ranges` even parts of [0, n), dealt out to as many threads.
void share_ranges(int64_t n, int64_t ranges, Share share, const void* work);

}  // namespace llmkern
