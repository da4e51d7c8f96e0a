// multiply.h: a tile of a matrix product on any GPU from sm_80: copies in flight, swizzled shared memory, mma.sync.
//
//     P[m, n] = sum over k of a[m, k] * b[n, k]            both operands indexed (row of the product, k)
//
// * Shared memory holds STAGES tiles of each operand. While one is multiplied, the copies of the next ones are under
// way
//   (cp.async): global memory's latency is hidden by work, not by more threads.
// * An operand lies in memory with k contiguous ("k-major") or with m or n contiguous ("mn-major"); either is copied as
//   it lies, 16 bytes a thread. The tensor cores want k-major fragments: `ldmatrix` gives them, transposing the other.
// * A row of a k-major tile is 128 bytes, all 32 banks. Eight rows at the same k would meet in the same four banks;
//   XORing the number of the 16-byte chunk with the row spreads them over all: no conflicts, no padding.
// * float32 is multiplied in TF32 with 10 bits, or as three products of split numbers, x = high + low:
//   high high + high low + low high, relative error 2^-22.
// * Tensor cores truncate as they add: a long sum of one sign drifts, about 1e-9 a product. Every `promote_every` tiles
//   the sum is added, rounded, to a second accumulator.
#pragma once

#include <cstring>

#include "gpu/device.h"

namespace barlow {

// A factor as it lies in memory.
struct Operand {
  const void* data;
  int64_t mn_stride, k_stride;  // elements; the one along which it is contiguous is 1 where vectors is true
  int mn_size;
  bool vectors;  // 16-byte aligned rows: copies may take 16 bytes at once
};

// Whether 16-byte accesses to rows of m are possible.
inline bool has_vectors(const Matrix& m) {
  const int64_t bytes = m.dtype == DType::float32 ? 4 : 2;
  return m.column_stride == 1 && m.row_stride * bytes % 16 == 0 && reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
}

template <class T_, int M_, int N_, int WARPS_M_, int WARPS_N_, int STAGES_, bool A_K_MAJOR, bool B_K_MAJOR,
          bool SPLIT_, bool PROMOTE_>
struct Multiply {
  using T = T_;
  static constexpr int M = M_, N = N_, WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, STAGES = STAGES_;
  static constexpr bool SPLIT = SPLIT_;      // float32 as three TF32 products
  static constexpr bool PROMOTE = PROMOTE_;  // long sums in a second accumulator
  static constexpr int K = 128 / sizeof(T);  // of a stage
  static constexpr int threads = 32 * WARPS_M * WARPS_N;
  using Team = WholeBlock<threads>;
  static constexpr int stage_bytes = (M + N) * 128;
  static constexpr int shared_bytes = STAGES * stage_bytes;
  static constexpr int ROWS = M / WARPS_M / 16;    // fragments of a warp: 16 rows each
  static constexpr int COLUMNS = N / WARPS_N / 8;  // and 8 columns each
  static_assert(ROWS >= 1 && COLUMNS >= 2 && COLUMNS % 2 == 0, "a warp's part is whole fragments");

  // acc[i][j][0..3]: rows g and g + 8, columns 2 t and 2 t + 1 of fragment (i, j); lane = 4 g + t.
  using Accumulator = float[ROWS][COLUMNS][4];

  // A tile's first row and first column, the part of k that is summed.
  static BARLOW_DEVICE void run(Accumulator& acc, const Operand& a, const Operand& b, int row, int column, int k_begin,
                                int k_end, int promote_every) {
    Accumulator part;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[i][j][e] = part[i][j][e] = 0.f;
      }
    }
    char* const shared = shared_memory();
    const int steps = ceil_div(k_end - k_begin, K);
    barrier();  // whatever was in shared memory has been read
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
      if (s < steps) copy_stage(shared + s * stage_bytes, a, b, row, column, k_begin + s * K, k_end);
      copy_async_commit();
    }
    for (int step = 0; step < steps; ++step) {
      copy_async_wait<STAGES - 2>();
      barrier();  // everybody's copies of this stage have arrived, and the stage before it has been read
      const int next = step + STAGES - 1;
      if (next < steps) copy_stage(shared + next % STAGES * stage_bytes, a, b, row, column, k_begin + next * K, k_end);
      copy_async_commit();
      const char* stage = shared + step % STAGES * stage_bytes;
      if constexpr (PROMOTE) {
        multiply_stage(part, stage, stage + M * 128);
        if ((step + 1) % promote_every == 0 || step + 1 == steps) {
#pragma unroll
          for (int i = 0; i < ROWS; ++i) {
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) {
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                acc[i][j][e] += part[i][j][e];
                part[i][j][e] = 0.f;
              }
            }
          }
        }
      } else {
        multiply_stage(acc, stage, stage + M * 128);
      }
    }
    barrier();  // shared memory is free: the last copies have been waited for with the last stage
  }

  // First row and column, within the tile, of this thread's numbers in fragment (i, j).
  static BARLOW_DEVICE int row_of(int i) { return (warp() / WARPS_N * ROWS + i) * 16 + lane() / 4; }
  static BARLOW_DEVICE int column_of(int j) { return (warp() % WARPS_N * COLUMNS + j) * 8 + lane() % 4 * 2; }

 private:
  static BARLOW_DEVICE void copy_stage(char* stage, const Operand& a, const Operand& b, int row, int column, int k,
                                       int k_end) {
    copy_tile<A_K_MAJOR, M>(stage, a, row, k, k_end);
    copy_tile<B_K_MAJOR, N>(stage + M * 128, b, column, k, k_end);
  }

  // Where the 16-byte chunk of a row lies in a tile.
  template <bool K_MAJOR, int MN>
  static BARLOW_DEVICE int chunk_offset(int row, int chunk) {
    if constexpr (K_MAJOR) {
      return row * 128 + ((chunk ^ (row & 7)) * 16);
    } else if constexpr (sizeof(T) == 2) {
      return row * MN * 2 + ((chunk ^ (row & 7)) * 16);  // ldmatrix reads eight rows of a chunk
    } else {
      return row * MN * 4 + ((chunk ^ (2 * (row & 3))) * 16);  // a warp reads two chunks of four rows
    }
  }

  template <bool K_MAJOR, int MN>
  static BARLOW_DEVICE void copy_tile(char* tile, const Operand& x, int mn, int k, int k_end) {
    constexpr int chunks = K_MAJOR ? 8 : MN / per_vec<T>;  // of a row
    constexpr int rows = K_MAJOR ? MN : K;
    static_assert(rows * chunks % threads == 0, "every thread copies as much");
    const int64_t row_stride = K_MAJOR ? x.mn_stride : x.k_stride;
    const int64_t column_stride = K_MAJOR ? x.k_stride : x.mn_stride;
    const int first_row = K_MAJOR ? mn : k, row_end = K_MAJOR ? x.mn_size : k_end;
    const int first_column = K_MAJOR ? k : mn, column_end = K_MAJOR ? k_end : x.mn_size;
#pragma unroll
    for (int i = 0; i < rows * chunks / threads; ++i) {
      const int index = i * threads + thread();
      const int r = index / chunks, chunk = index % chunks;
      const int row = first_row + r, column = first_column + chunk * per_vec<T>;
      const int count = row < row_end ? larger(0, smaller(per_vec<T>, column_end - column)) : 0;
      char* to = tile + chunk_offset<K_MAJOR, MN>(r, chunk);
      const T* from = static_cast<const T*>(x.data) + (count > 0 ? row * row_stride + column * column_stride : 0);
      if (x.vectors) {
        copy_async(to, from, count * static_cast<int>(sizeof(T)));
      } else {
        T values[per_vec<T>];
#pragma unroll
        for (int e = 0; e < per_vec<T>; ++e) values[e] = e < count ? load(from + e * column_stride) : T{};
        Vec16 v;
        memcpy(&v, values, 16);
        store(reinterpret_cast<Vec16*>(to), v);
      }
    }
  }

  // Rows mn .. mn + 15 at the step-th quarter of a stage's k: r[0] has rows 0 to 7 and the first half of k, r[1] rows 8
  // to 15, r[2] and r[3] the same of the second half. That is mma's fragment of a; r[0], r[2] and r[1], r[3] are two of
  // b.
  template <bool K_MAJOR, int MN>
  static BARLOW_DEVICE void load_fragment(uint32_t (&r)[4], const char* tile, int mn, int step) {
    const int l = lane();
    if constexpr (K_MAJOR) {
      load_matrices(r, tile + chunk_offset<true, MN>(mn + (l / 8 % 2) * 8 + l % 8, 2 * step + l / 16));
    } else if constexpr (sizeof(T) == 2) {
      load_matrices_transposed(
          r, tile + chunk_offset<false, MN>(16 * step + l / 16 * 8 + l % 8, mn / per_vec<T> + l / 8 % 2));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = mn + l / 4 + i % 2 * 8;
        const int offset = chunk_offset<false, MN>(8 * step + l % 4 + i / 2 * 4, column / 4) + column % 4 * 4;
        r[i] = load(reinterpret_cast<const uint32_t*>(tile + offset));
      }
    }
  }

  // Leaves the nearest TF32 number in x, and the nearest of what is left in low.
  static BARLOW_DEVICE void split(uint32_t (&x)[4], uint32_t (&low)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t high = to_tf32(bits_to_float(x[i]));
      low[i] = to_tf32(bits_to_float(x[i]) - bits_to_float(high));
      x[i] = high;
    }
  }

  static BARLOW_DEVICE void multiply_stage(Accumulator& acc, const char* a_tile, const char* b_tile) {
    const int row = warp() / WARPS_N * ROWS * 16, column = warp() % WARPS_N * COLUMNS * 8;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint32_t a[ROWS][4], a_low[SPLIT ? ROWS : 1][4];
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        load_fragment<A_K_MAJOR, M>(a[i], a_tile, row + 16 * i, step);
        if constexpr (SPLIT) {
          split(a[i], a_low[i]);
        } else if constexpr (sizeof(T) == 4) {
#pragma unroll
          for (int e = 0; e < 4; ++e) a[i][e] = to_tf32(bits_to_float(a[i][e]));
        }
      }
#pragma unroll
      for (int j = 0; j < COLUMNS; j += 2) {
        uint32_t b[4], b_low[4];
        load_fragment<B_K_MAJOR, N>(b, b_tile, column + 8 * j, step);
        if constexpr (SPLIT) {
          split(b, b_low);
        } else if constexpr (sizeof(T) == 4) {
#pragma unroll
          for (int e = 0; e < 4; ++e) b[e] = to_tf32(bits_to_float(b[e]));
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t b_high[2] = {b[h], b[h + 2]};
#pragma unroll
          for (int i = 0; i < ROWS; ++i) {
            if constexpr (SPLIT) {  // the small products first
              const uint32_t low[2] = {b_low[h], b_low[h + 2]};
              mma<T>(acc[i][j + h], a_low[i], b_high);
              mma<T>(acc[i][j + h], a[i], low);
            }
            mma<T>(acc[i][j + h], a[i], b_high);
          }
        }
      }
    }
  }
};

}  // namespace barlow
