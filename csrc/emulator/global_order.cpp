#include "global_order.h"

#include <algorithm>

#include "machine.h"

namespace llmkern {
namespace emulator {
namespace {

constexpr size_t kMostReleases = size_t{1} << 18;  // then nothing is a race any more

}  // namespace

GlobalOrder::State& GlobalOrder::state(const Warp& w) { return warp_[static_cast<size_t>(w.id)]; }

void GlobalOrder::begin_cta() {
  barrier_.fill(State());
  warp_.fill(State());
  ++epoch_;
  for (size_t i = 0; i < warps_; ++i) warp_[i].seen[i] = epoch_;
}

void GlobalOrder::new_epoch(const Warp& w) { state(w).seen[static_cast<size_t>(w.id)] = ++epoch_; }

void GlobalOrder::arrive(const Warp& w, int barrier) {
  State &mine = state(w), &all = barrier_[static_cast<size_t>(barrier)];
  for (size_t j = 0; j < warps_; ++j) {
    all.seen[j] = std::max(all.seen[j], mine.seen[j]);
    all.fenced[j] = std::max(all.fenced[j], mine.fenced[j]);
  }
  all.known = joined(all.known, mine.known);
  new_epoch(w);
}

void GlobalOrder::leave(const Warp& w, int barrier) {
  State &mine = state(w), &all = barrier_[static_cast<size_t>(barrier)];
  for (size_t j = 0; j < warps_; ++j) {
    mine.seen[j] = std::max(mine.seen[j], all.seen[j]);
    mine.fenced[j] = std::max(mine.fenced[j], all.fenced[j]);
  }
  mine.known = joined(mine.known, all.known);
  changed(&mine);
}

void GlobalOrder::fence(const Warp& w) {
  State& mine = state(w);
  mine.fenced = mine.seen;
  mine.known = joined(mine.known, mine.awaited);
  mine.awaited = nullptr;
  changed(&mine);
  new_epoch(w);
}

bool GlobalOrder::knows(const Warp& w, const GlobalAccess& access) const {
  const KnownPointer& known = warp_[static_cast<size_t>(w.id)].known;
  if (access.cta == static_cast<uint32_t>(w.cta->position + 1)) return true;
  if (known == nullptr) return false;
  const Epochs* epochs = (*known)[access.cta - 1];
  return epochs != nullptr && (*epochs)[static_cast<size_t>(access.warp)] >= access.epoch;
}

const GlobalAccess* GlobalOrder::touch(const Warp& w, const Instr& in, GlobalAccessKind kind,
                                       uint32_t value, OrderRecord* record) {
  const auto races = [&](const GlobalAccess& other) { return other.cta != 0 && !knows(w, other); };
  const bool reads = kind == GlobalAccessKind::kRead;
  const bool plain = reads || kind == GlobalAccessKind::kStore;
  const bool writes = !reads && kind != GlobalAccessKind::kAtomicRead;
  const bool same = kind == GlobalAccessKind::kStore && record->value == value;
  const GlobalAccess* other = nullptr;
  if (writes && races(record->read)) other = &record->read;
  if (plain && races(record->atomic)) other = &record->atomic;
  if (!same && races(record->store)) other = &record->store;
  if (other != nullptr && !gave_up_) return other;
  State& mine = state(w);
  const GlobalAccess now{static_cast<uint32_t>(w.cta->position + 1),
                         mine.seen[static_cast<size_t>(w.id)], in.index, w.id};
  mine.changed[1] = true;
  if (reads) {
    record->read = now;
  } else if (plain) {
    record->store = now;
    record->value = value;
  } else if (writes) {
    record->atomic = now;
  }
  return nullptr;
}

const GlobalOrder::Epochs* GlobalOrder::joined(const Epochs* a, const Epochs* b) {
  if (a == b || b == nullptr) return a;
  if (a == nullptr) return b;
  bool a_is_all = true, b_is_all = true;
  for (size_t j = 0; j < warps_; ++j) {
    a_is_all = a_is_all && (*a)[j] >= (*b)[j];
    b_is_all = b_is_all && (*b)[j] >= (*a)[j];
  }
  if (a_is_all || b_is_all) return a_is_all ? a : b;
  epochs_.push_back(*a);
  for (size_t j = 0; j < warps_; ++j) epochs_.back()[j] = std::max(epochs_.back()[j], (*b)[j]);
  return &epochs_.back();
}

GlobalOrder::KnownPointer GlobalOrder::joined(const KnownPointer& a, const KnownPointer& b) {
  if (a == b || b == nullptr) return a;
  if (a == nullptr) return b;
  std::shared_ptr<Known> both;
  for (size_t i = 0; i < ctas_; ++i) {
    const Epochs* epochs = joined((*a)[i], (*b)[i]);
    if (epochs == (*a)[i]) continue;
    if (both == nullptr) both = std::make_shared<Known>(*a);
    (*both)[i] = epochs;
  }
  return both == nullptr ? a : both;
}

// What is known together with what a release handed on.
GlobalOrder::KnownPointer GlobalOrder::joined(const Warp& w, const KnownPointer& a,
                                              uint32_t release) {
  const Release& r = releases_[release - 1];
  const bool learned = r.all && a != nullptr && (*a)[r.cta] != nullptr;
  if (learned && joined((*a)[r.cta], r.epochs) == (*a)[r.cta]) return a;
  KnownPointer known = joined(a, r.known);
  if (r.epochs == nullptr || r.cta == static_cast<size_t>(w.cta->position)) return known;
  const Epochs* before = known == nullptr ? nullptr : (*known)[r.cta];
  const Epochs* after = joined(before, r.epochs);
  if (after == before) return known;
  auto more = known == nullptr ? std::make_shared<Known>(ctas_) : std::make_shared<Known>(*known);
  (*more)[r.cta] = after;
  return more;
}

void GlobalOrder::learn(const Warp& w, const Instr& in, uint32_t release) {
  if (release == 0 || (in.order & kOwnCta) != 0) return;
  State& mine = state(w);
  const bool acquires = (in.order & kAcquires) != 0;
  KnownPointer& target = acquires ? mine.known : mine.awaited;
  KnownPointer known = joined(w, target, release);
  if (acquires && known != target) changed(&mine);
  target = std::move(known);
}

uint32_t GlobalOrder::hand_on(const Warp& w, const Instr& in, uint32_t before) {
  if ((in.order & kOwnCta) != 0) return 0;
  State& mine = state(w);
  const bool releases = (in.order & kReleases) != 0;
  const auto& epochs = releases ? mine.seen : mine.fenced;
  const bool nothing =
      std::all_of(epochs.begin(), epochs.end(), [](uint32_t epoch) { return epoch == 0; });
  if (nothing && mine.known == nullptr) return 0;
  const KnownPointer known = before == 0 ? mine.known : joined(w, mine.known, before);
  const bool more = known != mine.known;
  if (!mine.changed[releases] && !more) return mine.handed_on[releases];
  if (releases_.size() >= kMostReleases) {
    gave_up_ = true;
    return 0;
  }
  const Epochs* own = nullptr;
  if (!nothing) {
    epochs_.emplace_back(epochs.begin(), epochs.begin() + static_cast<int64_t>(warps_));
    own = &epochs_.back();
  }
  releases_.push_back({static_cast<size_t>(w.cta->position), own, known, releases && !more});
  const auto handed_on = static_cast<uint32_t>(releases_.size());
  if (!more) {
    mine.handed_on[releases] = handed_on;
    mine.changed[releases] = false;
  }
  if (releases) new_epoch(w);
  return handed_on;
}

}  // namespace emulator
}  // namespace llmkern
