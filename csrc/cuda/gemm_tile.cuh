// One operand's tile in shared memory: kBlock rows (m or n) by kLineBytes along k (32 elements of
// 16 bits or 16 floats), loaded 16 bytes a thread by cp.async and read by ldmatrix.
//
// kOuter false: k is contiguous in memory. A row is 64 bytes = 4 units of 16; two rows share a line
// of 128 bytes (all 32 banks). Unit u of row r stands at slot (r % 2) * 4 + (u ^ (r / 2 % 4)) of
// line r / 2, so eight consecutive rows at one u, which is what ldmatrix reads at a time, lie in
// eight distinct slots; so do the 2 rows x 4 units that eight lanes of cp.async write. A float is
// two columns of a 16-bit matrix to ldmatrix, which gives just the fragments of mma m16n8k8.
//
// kOuter true, 16 bits: the row index is contiguous. Stored as it comes, [k][row]; unit u (rows 8u
// .. 8u + 7) of line k stands at u ^ (k % 8): eight consecutive k at one u are in distinct slots,
// and ldmatrix.trans turns them over.
#pragma once

#include "common.cuh"

namespace llmkern {

constexpr int kLineBytes = 64;
constexpr int kOuterLines = 32;  // of k, where the row index is contiguous
constexpr int kGemmThreads = 128;
constexpr int kUnit = 16;  // bytes

struct Operand {
  const void* data[2];  // [1]: the second matrix of a gated product
  int line_bytes[2];    // from one line to the next: rows, or k where kOuter
  int rows;
};

template <bool kOuter, int kBlock>
struct Tile {
  static_assert(kBlock == 64 || kBlock == 128, "loads and swizzle assume 8 or 16 units a line");
  static constexpr int kBytes = kBlock * kLineBytes;
  static_assert(kOuterLines * kBlock * 2 == kBytes, "both layouts hold the same tile");
  static constexpr int kLoads = kBytes / kUnit / kGemmThreads;
  static constexpr int kLineUnits = kOuter ? kBlock / 8 : kLineBytes / kUnit;
  static constexpr int kLineStep = kGemmThreads / kLineUnits;  // lines from one load to the next

  __device__ static int offset(int line, int unit) {
    if (kOuter) return line * (kBlock * 2) + ((unit ^ (line & 7)) * kUnit);
    return (line >> 1) * 128 + ((line & 1) * 4 + (unit ^ ((line >> 1) & 3))) * kUnit;
  }
};

// A thread's part of loading tile after tile along k: `from` holds the sources of the next one.
// Rows past the end repeat the last one: they only reach elements of y that do not exist. Past the
// end of k both operands are filled with 0.
template <class Element, bool kOuter, int kBlock>
struct Loader {
  using T = Tile<kOuter, kBlock>;
  static_assert(!kOuter || sizeof(Element) == 2, "ldmatrix.trans turns 16-bit elements over");
  static constexpr int kSize = sizeof(Element);
  static constexpr int kBlockK = kLineBytes / kSize;
  uint64_t from[T::kLoads];
  uint64_t nothing;   // readable, for copies of 0 bytes
  int64_t line_step;  // kOuter: bytes from tile to tile, else kLineBytes
  uint32_t shared;    // of the first load in the first stage; the others follow at kStep
  int unit_bytes;     // kOuter: how much of the unit exists
  int own_k;          // of this thread's first element or line, in the tile

  // The swizzle repeats after kLineStep lines, so loads are a constant apart.
  static_assert(T::kLineStep % 8 == 0, "lines of one thread have the same swizzle");
  static constexpr int kStep = kOuter ? T::kLineStep * kBlock * 2 : T::kLineStep * kLineBytes;

  // tile: address in the first stage. parts: 2 where blocks of eight rows alternate between two
  // matrices. row0 counts rows of one; k0: where the first tile starts.
  __device__ Loader(const Operand& o, uint32_t tile, int row0, int parts, int k0) {
    const int line = threadIdx.x / T::kLineUnits, unit = threadIdx.x % T::kLineUnits;
    shared = tile + T::offset(line, unit);
    ptx::keep(shared);
    unit_bytes = kUnit;
    own_k = kOuter ? line : unit * (kUnit / kSize);
    nothing = ptx::global_address(o.data[0]);
#pragma unroll
    for (int i = 0; i < T::kLoads; ++i) {
      const int at = line + i * T::kLineStep;
      // The eight-row block that this unit belongs to, and the row that it starts at or is.
      const int block = kOuter ? unit : at / 8;
      const int part = parts == 2 ? block % 2 : 0;
      const int in_part = parts == 2 ? block / 2 * 8 : block * 8;
      const int row = row0 + in_part + (kOuter ? 0 : at % 8);
      const uint64_t data = ptx::global_address(o.data[part]);
      const int64_t line_bytes = o.line_bytes[part];
      if (kOuter) {
        unit_bytes = min(max((o.rows - row) * 2, 0), kUnit);
        line_step = line_bytes * kOuterLines;
        from[i] = data + line_bytes * (k0 + at) + (unit_bytes > 0 ? row : 0) * int64_t{2};
      } else {
        line_step = kLineBytes;
        from[i] = data + line_bytes * min(row, o.rows - 1) + k0 * int64_t{kSize} + unit * kUnit;
      }
    }
  }

  __device__ void advance(int tiles) {
#pragma unroll
    for (int i = 0; i < T::kLoads; ++i) {
      from[i] += tiles * line_step;
      ptx::keep(from[i]);  // not a base and a common distance, added up at each use
    }
  }

  // The tile that is kAhead after the one that `from` held when the last round ended, which k has
  // in full, to the stage kOffset bytes after the first.
  template <int kAhead, int kOffset>
  __device__ void load_ahead() {
    static_for<T::kLoads>([&](auto i) {
      constexpr int kTo = kOffset + i.value * kStep;
      if constexpr (kOuter) {
        ptx::cp_async_cg_16<kTo>(shared, from[i.value], unit_bytes);
      } else {
        ptx::cp_async_cg_16<kTo, kAhead * kLineBytes>(shared, from[i.value]);
      }
    });
    if (kOuter) advance(1);  // a distance that the instruction cannot hold
  }

  __device__ void end_round(int tiles) {
    if (!kOuter) advance(tiles);
  }

  // The same of a tile that k ends in; left: of k, from its start on.
  template <int kAhead, int kOffset>
  __device__ void load_part(int left) {
    const int own = left - own_k;
    static_for<T::kLoads>([&](auto i) {
      const int bytes = kOuter ? (own > i.value * T::kLineStep ? unit_bytes : 0)
                               : min(max(own * kSize, 0), kUnit);
      constexpr int kShift = kOuter ? 0 : kAhead * kLineBytes;
      ptx::cp_async_cg_16<kOffset + i.value * kStep>(
          shared, bytes > 0 ? from[i.value] + kShift : nothing, bytes);
    });
    if (kOuter) advance(1);
  }
};

// The same of floats for mma in TF32, which are rounded on their way into shared memory: once a
// block, where fragments would be rounded once a warp. A tile waits in registers in between.
template <int kBlock>
struct RoundingLoader : Loader<float, false, kBlock> {
  using Base = Loader<float, false, kBlock>;
  using Base::Base;
  static constexpr int kLoads = Base::T::kLoads;
  uint32_t held[kLoads][4];

  // As load_ahead and load_part, to the registers.
  template <int kAhead>
  __device__ void fetch_ahead() {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      ptx::ld_global_v4<kAhead * kLineBytes>(held[i], this->from[i]);
    }
  }

  template <int kAhead>
  __device__ void fetch_part(int left) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const uint64_t unit = this->from[i] + kAhead * kLineBytes;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        held[i][e] = this->own_k + e < left ? ptx::ld_global(unit + e * sizeof(float)) : 0;
      }
    }
  }

  // What they hold, to the stage kOffset + offset bytes after the first.
  template <int kOffset>
  __device__ void put(uint32_t offset) {
    static_for<kLoads>([&](auto i) {
      uint32_t rounded[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) rounded[e] = ptx::cvt_rna_tf32_f32(held[i.value][e]);
      ptx::st_shared_v4<kOffset + i.value * Base::kStep>(this->shared + offset, rounded);
    });
  }
};

// Where a lane's row of the ldmatrix is that gives fragments of 16 rows x 32 bytes of k: one
// address for each offset that the swizzle makes other than a constant. kRowsFirst: the second of
// the four 8x8 matrices is the next eight rows (operand A) or the next eight k (B).
template <bool kOuter, int kBlock, bool kRowsFirst>
struct Fragments {
  static constexpr int kSteps = kLineBytes / 32, kBlocks = kBlock / 32;
  static constexpr int kAddresses = kOuter ? kBlocks : kSteps;
  uint32_t at[kAddresses];

  // tile: address in the first stage. first_row is a multiple of 32 or more and so leaves alone
  // the bits that the swizzle and these offsets change.
  __device__ Fragments(uint32_t tile, int first_row) {
    const int lane = threadIdx.x % kWarp;
    const int second = (lane / 8) & 1, third = lane / 16;
    const int rows8 = kRowsFirst ? second : third, k8 = kRowsFirst ? third : second;
    const int offset = kOuter
                           ? Tile<kOuter, kBlock>::offset(k8 * 8 + lane % 8, first_row / 8 + rows8)
                           : Tile<kOuter, kBlock>::offset(first_row + rows8 * 8 + lane % 8, k8);
#pragma unroll
    for (int i = 0; i < kAddresses; ++i) {
      at[i] = tile + (offset ^ (i * 2 * kUnit));
      ptx::keep(at[i]);
    }
  }

  // Rows kIndex * 16 .. + 15 from the first, k kStep * 16 .. + 15, of the stage kOffset + offset
  // bytes after the first.
  template <int kIndex, int kStep, int kOffset>
  __device__ void load(uint32_t (&r)[4], uint32_t offset) const {
    if constexpr (kOuter) {
      ptx::ldmatrix_x4_trans<kOffset + kStep * 16 * kBlock * 2>(r, at[kIndex] + offset);
    } else {
      ptx::ldmatrix_x4<kOffset + kIndex * 16 * kLineBytes>(r, at[kStep] + offset);
    }
  }
};

}  // namespace llmkern
