// ld and st in all spaces. An access is resolved to host pointers first (access.h), then moved.
#include <cstring>
#include <type_traits>

#include "access.h"
#include "lanes.h"
#include "modifiers.h"

namespace llmkern {
namespace emulator {

MemoryModifiers take_memory_modifiers(Decoder& d) {
  MemoryModifiers m;
  bool order = false, scope = false, cache = false;
  const auto once = [&](bool* flag) {
    if (*flag) d.fail("two modifiers of one kind before ." + d.peek());
    *flag = true;
  };
  for (;;) {
    const int space = d.take_optional(
        {"global", "shared", "shared::cta", "local", "param", "const", "param::entry"});
    if (space >= 0) {
      const Space spaces[] = {Space::kGlobal, Space::kShared, Space::kShared, Space::kLocal,
                              Space::kParam,  Space::kConst,  Space::kParam};
      once(&m.has_space);
      m.space = spaces[space];
      continue;
    }
    const int ordered =
        d.take_optional({"weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "mmio"});
    if (ordered >= 0) {
      // Code from before fences had a form for acquiring relies on volatile: see global_order.h.
      constexpr uint8_t orders[] = {0,
                                    kStrong | kAcquires,
                                    kStrong,
                                    kStrong | kAcquires,
                                    kStrong | kReleases,
                                    kStrong | kReleases | kAcquires,
                                    kStrong | kAcquires};
      once(&order);
      m.order = static_cast<uint8_t>(m.order | orders[ordered]);
      continue;
    }
    const int reach = d.take_optional({"cta", "cluster", "gpu", "sys"});
    if (reach >= 0) {
      once(&scope);
      if (reach < 2) m.order |= kOwnCta;
    } else if (d.take("L2::cache_hint") || d.take("L1::cache_hint")) {
      once(&m.cache_hint);
    } else if (d.take_optional({"ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc"}) >= 0) {
      cache = true;  // .nc may follow .ca
    } else if (d.take_optional({"L1::evict_normal", "L1::evict_unchanged", "L1::evict_first",
                                "L1::evict_last", "L1::no_allocate", "L2::evict_first",
                                "L2::evict_last", "L2::evict_normal", "L2::64B", "L2::128B",
                                "L2::256B"}) < 0) {
      break;
    }
  }
  (void)cache;
  if ((m.order & kOwnCta) != 0) m.order &= kStrong | kOwnCta;
  return m;
}

namespace {

constexpr int kMostBytes = 32;

template <Space kSpace, class T, class R>
void load(Warp& w, const Instr& in, uint32_t mask) {
  uint64_t address[kLanes];
  char* from[kLanes];
  effective_addresses(w, in, address);
  resolve_read(w, in, mask, kSpace, address, static_cast<int>(sizeof(T)) * in.width, from);
  for (int v = 0; v < in.width; ++v) {
    R* d = w.at<R>(in.r[v]);
    const auto move = [&](int l) {
      T value;
      std::memcpy(&value, from[l] + static_cast<size_t>(v) * sizeof(T), sizeof(T));
      d[l] = static_cast<R>(value);
    };
    if (mask == kAllLanes) {
      for (int l = 0; l < kLanes; ++l) move(l);
    } else {
      for_lanes(mask, move);
    }
  }
}

template <int kBytes, class T>
void scatter(uint32_t mask, const T (*data)[kMostBytes / sizeof(T)], char* const* to) {
  if (mask == kAllLanes) {
    for (int l = 0; l < kLanes; ++l) std::memcpy(to[l], data[l], kBytes);
  } else {
    for_lanes(mask, [&](int l) { std::memcpy(to[l], data[l], kBytes); });
  }
}

template <Space kSpace, class T, class R>
void store(Warp& w, const Instr& in, uint32_t mask) {
  uint64_t address[kLanes];
  char* to[kLanes];
  T data[kLanes][kMostBytes / sizeof(T)];
  effective_addresses(w, in, address);
  for (int v = 0; v < in.width; ++v) {
    const R* s = w.at<R>(in.r[v + 1]);
    for (int l = 0; l < kLanes; ++l) data[l][v] = static_cast<T>(s[l]);
  }
  const int bytes = static_cast<int>(sizeof(T)) * in.width;
  resolve_write(w, in, mask, kSpace, address, bytes, reinterpret_cast<char*>(data), kMostBytes, to);
  switch (in.width) {
    case 1:
      return scatter<sizeof(T)>(mask, data, to);
    case 2:
      return scatter<2 * sizeof(T)>(mask, data, to);
    case 4:
      return scatter<4 * sizeof(T)>(mask, data, to);
    default:
      return scatter<kMostBytes>(mask, data, to);
  }
}

template <Space kSpace, class T>
Handler load_into(int register_bytes) {
  using Narrow = typename std::conditional<std::is_signed<T>::value, int16_t, uint16_t>::type;
  using Middle = typename std::conditional<std::is_signed<T>::value, int32_t, uint32_t>::type;
  using Large = typename std::conditional<std::is_signed<T>::value, int64_t, uint64_t>::type;
  switch (register_bytes) {
    case 2:
      return &load<kSpace, T, Narrow>;
    case 4:
      return &load<kSpace, T, Middle>;
    default:
      return &load<kSpace, T, Large>;
  }
}
template <Space kSpace, class T>
Handler store_from(int register_bytes) {
  switch (register_bytes) {
    case 2:
      return &store<kSpace, T, uint16_t>;
    case 4:
      return &store<kSpace, T, uint32_t>;
    default:
      return &store<kSpace, T, uint64_t>;
  }
}

template <Space kSpace>
Handler pick_load(Type t, int register_bytes) {
  const bool is_signed = t >= Type::kS8 && t <= Type::kS64;
  switch (bytes_of(t)) {
    case 1:
      return is_signed ? load_into<kSpace, int8_t>(register_bytes)
                       : load_into<kSpace, uint8_t>(register_bytes);
    case 2:
      return is_signed ? load_into<kSpace, int16_t>(register_bytes)
                       : load_into<kSpace, uint16_t>(register_bytes);
    case 4:
      return is_signed ? load_into<kSpace, int32_t>(register_bytes)
                       : load_into<kSpace, uint32_t>(register_bytes);
    default:
      return load_into<kSpace, uint64_t>(8);
  }
}
template <Space kSpace>
Handler pick_store(Type t, int register_bytes) {
  switch (bytes_of(t)) {
    case 1:
      return store_from<kSpace, uint8_t>(register_bytes);
    case 2:
      return store_from<kSpace, uint16_t>(register_bytes);
    case 4:
      return store_from<kSpace, uint32_t>(register_bytes);
    default:
      return store_from<kSpace, uint64_t>(8);
  }
}

Handler pick_load(Space space, Type t, int register_bytes) {
  switch (space) {
    case Space::kGlobal:
      return pick_load<Space::kGlobal>(t, register_bytes);
    case Space::kShared:
      return pick_load<Space::kShared>(t, register_bytes);
    case Space::kLocal:
      return pick_load<Space::kLocal>(t, register_bytes);
    case Space::kParam:
      return pick_load<Space::kParam>(t, register_bytes);
    case Space::kConst:
      return pick_load<Space::kConst>(t, register_bytes);
    default:
      return pick_load<Space::kGeneric>(t, register_bytes);
  }
}
Handler pick_store(Space space, Type t, int register_bytes) {
  switch (space) {
    case Space::kGlobal:
      return pick_store<Space::kGlobal>(t, register_bytes);
    case Space::kShared:
      return pick_store<Space::kShared>(t, register_bytes);
    case Space::kLocal:
      return pick_store<Space::kLocal>(t, register_bytes);
    default:
      return pick_store<Space::kGeneric>(t, register_bytes);
  }
}

// A parameter's value is the same in all lanes.
template <class T>
void load_parameter(Warp& w, const Instr& in, uint32_t mask) {
  T value;
  std::memcpy(&value, w.launch->parameters.data() + in.imm, sizeof value);
  T* d = w.at<T>(in.r[0]);
  for_lanes(mask, [&](int l) { d[l] = value; });
}

Class class_of(Space space, bool loads) {
  switch (space) {
    case Space::kShared:
      return loads ? Class::kSharedLoad : Class::kSharedStore;
    case Space::kLocal:
      return Class::kLocal;
    case Space::kParam:
    case Space::kConst:
      return Class::kParam;
    default:
      return loads ? Class::kGlobalLoad : Class::kGlobalStore;
  }
}

// Data registers: one, or a vector; all of one size. Returns that size.
int data_operands(Decoder& d, int i, Type t, int width, bool loads) {
  std::vector<Operand> parts = {d.operand(i)};
  if (d.operand(i).kind == Operand::kVector || width > 1) parts = d.vector(i, width);
  int size = 0;
  for (const Operand& part : parts) {
    const int this_size = d.size_of_register(part);
    if (this_size != 0 && size != 0 && this_size != size)
      d.fail("the vector's registers differ in size");
    if (this_size != 0) size = this_size;
  }
  if (size == 0) size = std::max(2, bytes_of(t));
  const Type sized = size == 2 ? Type::kB16 : size == 4 ? Type::kB32 : Type::kB64;
  if (size < bytes_of(t) || size > 8) d.fail("a data register has the wrong size for this type");
  for (const Operand& part : parts)
    loads ? d.dst(part, sized) : d.src(part, part.kind == Operand::kName ? sized : t);
  return size;
}

void take_shape(Decoder& d, Type* t, int* width) {
  const int vec = d.take_optional({"v2", "v4", "v8"});
  *width = vec < 0 ? 1 : 2 << vec;
  *t = d.take_type();
  if (*t == Type::kPred || bytes_of(*t) > 8) d.fail("type is not known here");
  if (*width * bytes_of(*t) > kMostBytes || (*width == 8 && bytes_of(*t) < 4))
    d.fail("the vector is too large");
}

// Volatile, relaxed ... accesses to global memory order CTAs.
void set_order(Decoder& d, const MemoryModifiers& m) {
  d.out.order = m.order;
  if (m.order != 0 && (m.space == Space::kGlobal || m.space == Space::kGeneric))
    d.builder->kernel->has_global_atomics = true;
}

// .param names both the kernel's parameters and what calls pass; the latter are local memory.
Space space_of(const Decoder& d, Space space, int address) {
  if (space != Space::kParam || d.count() <= address) return space;
  const Variable* v = d.builder->find_variable(d.operand(address).name, d.s.scope);
  return v != nullptr && d.builder->is_local(*v) ? Space::kLocal : space;
}

void decode_ld(Decoder& d) {
  MemoryModifiers m = take_memory_modifiers(d);
  m.space = space_of(d, m.space, 1);
  Type t;
  int width;
  take_shape(d, &t, &width);
  d.expect(2, m.cache_hint ? 3 : 2);
  const int size = data_operands(d, 0, t, width, true);
  d.address(1, m.space);
  if (d.count() == 3) d.src(2, Type::kB64);
  d.out.space = m.space;
  d.out.width = static_cast<uint8_t>(width);
  d.out.bytes = static_cast<uint8_t>(bytes_of(t));
  d.out.klass = class_of(m.space, true);
  set_order(d, m);
  d.out.run = pick_load(m.space, t, size);
  // [name + offset] of a parameter that lies inside: no address arithmetic.
  const Operand& from = d.operand(1);
  const Variable* v =
      m.space == Space::kParam ? d.builder->find_variable(from.name, d.s.scope) : nullptr;
  if (v == nullptr || width != 1 || size != bytes_of(t) || size < 4) return;
  const int64_t at = static_cast<int64_t>(d.builder->address_of(*v)) + from.offset;
  if (from.offset < 0 || from.offset + size > v->bytes || at % size != 0)
    d.fail("the read is outside the parameter");
  d.out.imm = at;
  d.out.mode = kWholeParameter;
  d.out.run = size == 4 ? &load_parameter<uint32_t> : &load_parameter<uint64_t>;
}

void decode_st(Decoder& d) {
  MemoryModifiers m = take_memory_modifiers(d);
  m.space = space_of(d, m.space, 0);
  Type t;
  int width;
  take_shape(d, &t, &width);
  if (m.space == Space::kParam || m.space == Space::kConst)
    d.fail("this space cannot be stored to");
  d.expect(2, m.cache_hint ? 3 : 2);
  d.address(0, m.space);
  const int size = data_operands(d, 1, t, width, false);
  if (d.count() == 3) d.src(2, Type::kB64);
  d.out.space = m.space;
  d.out.width = static_cast<uint8_t>(width);
  d.out.bytes = static_cast<uint8_t>(bytes_of(t));
  d.out.klass = class_of(m.space, false);
  set_order(d, m);
  d.out.run = pick_store(m.space, t, size);
}

}  // namespace

void add_memory_opcodes(OpcodeTable* table) {
  (*table)["ld"] = decode_ld;
  (*table)["st"] = decode_st;
}

}  // namespace emulator
}  // namespace llmkern
