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
  int64_t stride[2];    // elements from one line to the next: rows, or k where kOuter
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

// A thread's part of loading tile after tile along k; each call loads the next one. Rows past the
// end repeat the last one: they only reach elements of y that do not exist. Past the end of k both
// operands are filled with 0.
template <class Element, bool kOuter, int kBlock>
struct Loader {
  using T = Tile<kOuter, kBlock>;
  static_assert(!kOuter || sizeof(Element) == 2, "ldmatrix.trans turns 16-bit elements over");
  static constexpr int kSize = sizeof(Element);
  const uint8_t* from[T::kLoads];
  const uint8_t* nothing;  // readable, for copies of 0 bytes
  int64_t advance;         // bytes from tile to tile
  int shared;              // of the first load; the others follow at kStep
  int unit_bytes;          // kOuter: how much of the unit exists
  int left;                // of k, from this thread's first element or line on

  // The swizzle repeats after kLineStep lines, so loads are a constant apart.
  static_assert(T::kLineStep % 8 == 0, "lines of one thread have the same swizzle");
  static constexpr int kStep = kOuter ? T::kLineStep * kBlock * 2 : T::kLineStep * kLineBytes;

  // What must be left of k for each of this thread's loads to be whole.
  static constexpr int kWhole = kOuter ? (T::kLoads - 1) * T::kLineStep + 1 : kUnit / kSize;

  // parts: 2 where blocks of eight rows alternate between two matrices. row0 counts rows of one.
  __device__ Loader(const Operand& o, int row0, int parts, int k_size) {
    const int line = threadIdx.x / T::kLineUnits, unit = threadIdx.x % T::kLineUnits;
    shared = T::offset(line, unit);
    unit_bytes = kUnit;
    left = k_size - (kOuter ? line : unit * (kUnit / kSize));
#pragma unroll
    for (int i = 0; i < T::kLoads; ++i) {
      const int at = line + i * T::kLineStep;
      // The eight-row block that this unit belongs to, and the row that it starts at or is.
      const int block = kOuter ? unit : at / 8;
      const int part = parts == 2 ? block % 2 : 0;
      const int in_part = parts == 2 ? block / 2 * 8 : block * 8;
      const int row = row0 + in_part + (kOuter ? 0 : at % 8);
      const auto data = static_cast<const uint8_t*>(o.data[part]);
      const int64_t line_bytes = o.stride[part] * kSize;
      nothing = data;
      if (kOuter) {
        unit_bytes = min(max((o.rows - row) * 2, 0), kUnit);
        advance = line_bytes * kOuterLines;
        from[i] = data + at * line_bytes + (unit_bytes > 0 ? row : 0) * int64_t{2};
      } else {
        advance = kLineBytes;
        from[i] = data + min(row, o.rows - 1) * line_bytes + unit * kUnit;
      }
    }
  }

  // Bytes of load i that exist where the tile reaches past the end of k.
  __device__ int bytes_of(int i) const {
    if (kOuter) return left > i * T::kLineStep ? unit_bytes : 0;
    return min(max(left * kSize, 0), kUnit);
  }

  __device__ void operator()(uint32_t stage) {
    if (left >= kWhole) {
#pragma unroll
      for (int i = 0; i < T::kLoads; ++i) {
        ptx::cp_async_cg_16(stage + shared + i * kStep, from[i], unit_bytes);
      }
    } else {
#pragma unroll
      for (int i = 0; i < T::kLoads; ++i) {
        const int bytes = bytes_of(i);
        ptx::cp_async_cg_16(stage + shared + i * kStep, bytes > 0 ? from[i] : nothing, bytes);
      }
    }
#pragma unroll
    for (int i = 0; i < T::kLoads; ++i) from[i] += advance;
    left -= kOuter ? kOuterLines : kLineBytes / kSize;
  }
};

// Where a lane's row of the ldmatrix is that gives fragments of 16 rows x 32 bytes of k,
// kRowsFirst: the second of the four 8x8 matrices is the next eight rows (operand A) or the next
// eight k (B).
template <bool kOuter, int kBlock, bool kRowsFirst>
struct Fragments {
  int lane_offset;

  __device__ explicit Fragments(int first_row) {
    const int lane = threadIdx.x % kWarp;
    const int second = (lane / 8) & 1, third = lane / 16;
    const int rows8 = kRowsFirst ? second : third, k8 = kRowsFirst ? third : second;
    lane_offset = kOuter ? Tile<kOuter, kBlock>::offset(k8 * 8 + lane % 8, first_row / 8 + rows8)
                         : Tile<kOuter, kBlock>::offset(first_row + rows8 * 8 + lane % 8, k8);
  }

  // Rows block * 16 .. + 15 from the first, k step * 16 .. + 15. Exact because first_row is a
  // multiple of 32 or more and so leaves alone the bits that the swizzle and these offsets change.
  __device__ void load(uint32_t (&r)[4], uint32_t stage, int block, int step) const {
    if (kOuter) {
      ptx::ldmatrix_x4_trans(r,
                             stage + (lane_offset ^ (block * 2 * kUnit)) + step * 16 * kBlock * 2);
    } else {
      ptx::ldmatrix_x4(r, stage + (lane_offset ^ (step * 2 * kUnit)) + block * 16 * kLineBytes);
    }
  }
};

}  // namespace llmkern
