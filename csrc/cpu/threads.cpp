#include "threads.h"

#include <atomic>

namespace llmkern {
namespace {

ThreadRuntime runtime{};

// clang's description of a place in the source; only its shape matters.
struct Location {
  int32_t reserved_1, flags, reserved_2, reserved_3;
  const char* source;
};
constexpr int32_t kFromCompiledCode = 2;
Location location{0, kFromCompiledCode, 0, 0, ";unknown;unknown;0;0;;"};

struct Work {
  int64_t n, shares;
  Share share;
  const void* work;
  alignas(64) std::atomic<int64_t> next;  // apart from what all threads read
};

void take_tasks(void* data) {
  Work& w = *static_cast<Work*>(data);
  const int thread = runtime.omp_get_thread_num();
  for (;;) {
    const int64_t task = w.next.fetch_add(1, std::memory_order_relaxed);
    if (task >= w.n) return;
    w.share(w.work, task, thread);
  }
}

// A runtime may give fewer threads than it was asked for.
void take_ranges(void* data) {
  const Work& w = *static_cast<const Work*>(data);
  const int threads = runtime.omp_get_num_threads();
  for (int64_t r = runtime.omp_get_thread_num(); r < w.shares; r += threads)
    w.share(w.work, w.n * r / w.shares, w.n * (r + 1) / w.shares);
}

using Body = void (*)(void*);

void clang_body(int32_t*, int32_t*, Body body, void* data) { body(data); }

void enter(Body body, int threads, Work& work) {
  if (runtime.GOMP_parallel) {
    runtime.GOMP_parallel(body, &work, static_cast<unsigned>(threads), 0);
    return;
  }
  runtime.kmpc_push_num_threads(&location, runtime.kmpc_global_thread_num(&location), threads);
  runtime.kmpc_fork_call(&location, 2, reinterpret_cast<void (*)()>(&clang_body), body,
                         static_cast<void*>(&work));
}

}  // namespace

void use_threads(const ThreadRuntime& with) { runtime = with; }

int max_threads() {
  if (!runtime.omp_get_max_threads || runtime.omp_in_parallel()) return 1;
  static thread_local bool known = false;
  if (!known) {
    known = true;
    if (runtime.in_new_thread) runtime.in_new_thread();
  }
  return runtime.omp_get_max_threads();
}

void share_tasks(int64_t tasks, int threads, Share share, const void* work) {
  Work w{tasks, tasks, share, work, {0}};
  enter(&take_tasks, threads, w);
}

void share_ranges(int64_t n, int64_t ranges, Share share, const void* work) {
  Work w{n, ranges, share, work, {0}};
  enter(&take_ranges, static_cast<int>(ranges), w);
}

}  // namespace llmkern
