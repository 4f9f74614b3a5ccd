// A launch: CTAs in order (or shuffled by the seed) over host threads. The report is that of the
// earliest CTA that fails, whichever thread ran it: later CTAs are dropped, earlier ones go on.
#include <algorithm>
#include <atomic>
#include <exception>
#include <limits>
#include <numeric>
#include <thread>

#include "device_printf.h"
#include "machine.h"
#include "random_order.h"
#include "report.h"

namespace llmkern {
namespace emulator {
namespace {

// What workers of earlier launches leave for later ones, since clearing it costs more than a small
// launch: shadows forget by epochs and ticks, and all registers are set when a worker starts.
struct Kept {
  SharedShadow shadow;
  std::unique_ptr<LaneShadow> lanes;
  std::unique_ptr<Patterns> patterns;
  std::vector<char> registers;
};
class Shelf {
 public:
  void take(Worker* worker) {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (kept_.empty()) return;
    worker->shadow = std::move(kept_.back().shadow);
    worker->lanes = std::move(kept_.back().lanes);
    worker->patterns = std::move(kept_.back().patterns);
    worker->registers = std::move(kept_.back().registers);
    kept_.pop_back();
  }
  void put(Worker* worker) {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (kept_.size() == kMost) return;
    kept_.push_back({std::move(worker->shadow), std::move(worker->lanes),
                     std::move(worker->patterns), std::move(worker->registers)});
  }

 private:
  static constexpr size_t kMost = 8;
  std::mutex mutex_;
  std::vector<Kept> kept_;
};
Shelf shelf;

class Run {
 public:
  explicit Run(Launch& launch) : launch_(launch) {
    ctas_ = int64_t{launch.grid[0]} * launch.grid[1] * launch.grid[2];
    if (launch.options.seed != 0) {
      order_.resize(static_cast<size_t>(ctas_));
      std::iota(order_.begin(), order_.end(), int64_t{0});
      Shuffler shuffle(launch.options.seed);
      shuffle(&order_);
    }
  }

  Result run() {
    int threads = launch_.kernel->has_global_atomics ? 1 : launch_.options.threads;
    threads = static_cast<int>(std::min<int64_t>(threads, ctas_));
    result_.counts.resize(launch_.kernel->code.size());
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back([this] { work_or_keep_error(); });
    work_or_keep_error();
    for (std::thread& t : others) t.join();
    if (error_ != nullptr) std::rethrow_exception(error_);
    gather_printed();
    const GlobalRace& race = launch_.race;
    if (race.later >= 0 && race.later < first_failure_) {
      result_.report = describe_global_race(launch_, static_cast<uint64_t>(linear(race.later)));
    }
    return std::move(result_);
  }

 private:
  int64_t linear(int64_t position) const {
    return order_.empty() ? position : order_[static_cast<size_t>(position)];
  }

  // No memory, for one: an exception must not leave a thread.
  void work_or_keep_error() {
    try {
      work();
    } catch (const std::exception&) {
      const std::lock_guard<std::mutex> guard(mutex_);
      error_ = std::current_exception();
    }
  }

  void work() {
    Worker worker;
    prepare(&worker);
    for (;;) {
      const int64_t position = next_++;
      if (position >= ctas_ || position > first_failure_) break;
      try {
        run_cta(worker, linear(position), position);
      } catch (const Fault& fault) {
        const std::lock_guard<std::mutex> guard(mutex_);
        if (position < first_failure_) {
          first_failure_ = position;
          result_.report = describe_fault(launch_, worker.cta, fault);
        }
      }
      if (worker.printed.empty()) continue;
      const std::lock_guard<std::mutex> guard(mutex_);
      printed_.emplace_back(position, std::move(worker.printed));
      worker.printed.clear();
    }
    shelf.put(&worker);
    const std::lock_guard<std::mutex> guard(mutex_);
    for (size_t i = 0; i < result_.counts.size(); ++i) result_.counts[i].add(worker.counts[i]);
  }

  void gather_printed() {
    std::sort(printed_.begin(), printed_.end());
    for (const auto& part : printed_) {
      if (part.first > first_failure_) break;
      result_.printed += part.second;
      if (result_.printed.size() < kMostPrinted) continue;
      result_.printed.resize(kMostPrinted);
      result_.printed += "\n(more was printed)\n";
      break;
    }
  }

  void prepare(Worker* worker) {
    const Kernel& k = *launch_.kernel;
    const size_t stride = (k.register_image.size() + 63) / 64 * 64;
    const auto warps = static_cast<size_t>(launch_.warps());
    worker->launch = &launch_;
    shelf.take(worker);
    const size_t bytes = stride * warps + 64;
    if (worker->registers.size() < bytes) worker->registers.resize(bytes);
    char* base = worker->registers.data();
    base += (64 - reinterpret_cast<uintptr_t>(base) % 64) % 64;
    for (size_t i = 0; i < warps; ++i)
      std::copy(k.register_image.begin(), k.register_image.end(), base + stride * i);
    worker->shared.resize(static_cast<size_t>(launch_.shared_bytes()) + 16);
    worker->local.resize(static_cast<size_t>(k.local_bytes) * kLanes * warps + 16);
    worker->poison.resize(static_cast<size_t>(k.poison_slots) * warps + 1);
    worker->counts.resize(k.code.size());
    worker->hints.resize(k.code.size());
    if (worker->patterns == nullptr) worker->patterns = std::make_unique<Patterns>();
    worker->patterns->begin_launch(static_cast<size_t>(k.slots) * warps);
    if (!launch_.options.warp_races) {
      worker->lanes = nullptr;
    } else if (worker->lanes == nullptr) {
      worker->lanes = std::make_unique<LaneShadow>();
    }
  }

  Launch& launch_;
  int64_t ctas_ = 0;
  std::vector<int64_t> order_;
  std::atomic<int64_t> next_{0};
  std::atomic<int64_t> first_failure_{std::numeric_limits<int64_t>::max()};
  std::mutex mutex_;
  std::exception_ptr error_;
  std::vector<std::pair<int64_t, std::string>> printed_;  // by position of the CTA
  Result result_;
};

}  // namespace

Result run_launch(Launch& launch) { return Run(launch).run(); }

}  // namespace emulator
}  // namespace llmkern
