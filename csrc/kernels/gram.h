// gram.h: K_a = A_hat A_hat^T, K_b = B_hat B_hat^T, their inner product, and the terms of the loss. One launch.
//
//     reads   A_hat, B_hat [N, D]; the sums of normalize
//     writes  K_a / D - shift (I - 1 1^T / N) and K_b / D alike, [2 N, N] in the compute dtype (only for a gradient)
//             loss, on_diag, off_diag
//     FLOPs   2 N^2 D: both products, each on its lower triangle
//     bytes   each of T = ceil(N / BLOCK) rows of tiles is read about T times, from L2 where slices march together; the
//             partial tiles, 4 split N^2 bytes, are written and read once
//
// The ideas:
//
// * A block computes one (tile of the lower triangle, view, slice of D): it writes its partial tile and draws a ticket.
//   The block that draws a tile's last ticket adds the tile's partials in the order of the slices, multiplies K_a and
//   K_b elementwise, and writes both triangles. Slices fill the chip where tiles do not (N = 256: 10 tiles, 132
//   multiprocessors). The workspace takes the place of the input gradients, which do not exist yet.
// * Partial tiles are read by the very threads, of another block, that hold the same fragments. So they are stored as
//   they lie in registers, a thread's four numbers at a time, and never rearranged.
// * The bulk is taken out. Standardised features in many dimensions give K / D close to I - 1 1^T / N, whose rounding to
//   bfloat16 would drown the rest; and the multiple of A_hat that it puts into K_b A_hat is removed by the batch norm's
//   backward anyway. K / D - I + 1 1^T / N is stored, and gram_grad adds A_hat in float32; 1^T A_hat is 0.
#pragma once

#include "blocks/multiply.h"
#include "blocks/reduce.h"

namespace barlow {

// (row, column) of a tile of a lower triangle, counted row by row.
BARLOW_DEVICE void lower_triangle_tile(int tile, int& row, int& column) {
  row = static_cast<int>((sqrtf(8.f * tile + 1.f) - 1.f) * 0.5f);
  if (row * (row + 1) / 2 > tile) --row;  // the root is rounded
  if ((row + 1) * (row + 2) / 2 <= tile) ++row;
  column = tile - row * (row + 1) / 2;
}

// Where this thread's part of a partial tile lies, a fragment every Team::threads: the partials are
// [split, 2, tiles, fragments, threads] of four floats.
template <class Product>
BARLOW_DEVICE Vec16* partial_tile(const Gram& p, int tiles, int tile, int view, int part) {
  constexpr int tile_size = Product::ROWS * Product::COLUMNS * Product::Team::threads;
  return reinterpret_cast<Vec16*>(p.partials) + ((part * 2 + view) * static_cast<int64_t>(tiles) + tile) * tile_size +
         thread();
}

// When one (tile, view, slice) stands in the partials, or one of PIECES equal parts of its fragments: the last to come
// here adds up the slices of both views. shared: 512 bytes of shared memory.
template <class Product, int PIECES>
BARLOW_DEVICE void complete_gram(const Gram& p, int tiles, int tile, int piece, int row, int column, char* shared) {
  using T = typename Product::T;
  using Team = typename Product::Team;
  constexpr int fragments = Product::ROWS * Product::COLUMNS / PIECES;
  double* const scratch = reinterpret_cast<double*>(shared);
  int* const ticket = reinterpret_cast<int*>(scratch + Team::threads / 32);
  const int id = tile * PIECES + piece, all = tiles * PIECES;
  if (!last_to_arrive<Team>(p.counters + id, 2 * p.split, ticket)) return;

  double sum = 0;
  const float by_n = 1.f / p.n;
  const Vec16* const first = partial_tile<Product>(p, tiles, tile, 0, 0);
  const int64_t view_size = partial_tile<Product>(p, tiles, tile, 1, 0) - first;
#pragma unroll 1
  for (int f = piece * fragments; f < (piece + 1) * fragments; ++f) {
    const Vec16* from = first + f * Team::threads;
    float k_a[4] = {0.f, 0.f, 0.f, 0.f}, k_b[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
    for (int s = 0; s < p.split; ++s) {
      const Vec16 a = load_from_l2(from), b = load_from_l2(from + view_size);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        k_a[e] += bits_to_float(a.word[e]);
        k_b[e] += bits_to_float(b.word[e]);
      }
      from += 2 * view_size;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int m = row + Product::row_of(f / Product::COLUMNS) + e / 2 * 8;
      const int n = column + Product::column_of(f % Product::COLUMNS) + e % 2;
      if (m >= n && m < p.n) {
        // The upper triangle is not computed: what is below the diagonal counts twice.
        sum += static_cast<double>(k_a[e]) * static_cast<double>(k_b[e]) * (m > n ? 2.0 : 1.0);
        if (p.k.data != nullptr) {
          const float shift = p.shift * ((m == n ? 1.f : 0.f) - by_n);
          const T a = from_float<T>(k_a[e] / p.d - shift), b = from_float<T>(k_b[e] / p.d - shift);
          T* const k = static_cast<T*>(p.k.data);
          const int64_t pitch = p.k.row_stride;
          k[m * pitch + n] = a;
          k[(p.n + m) * pitch + n] = b;
          k[n * pitch + m] = a;
          k[(p.n + n) * pitch + m] = b;
        }
      }
    }
  }
  sum = block_sum<Team>(sum, scratch);
  if (thread() == 0) p.inner[id] = sum;

  if (!last_to_arrive<Team>(p.counters + all, all, ticket)) return;
  const double inner = sum_of<Team>(p.inner, all, scratch);                 // <K_a, K_b>
  const double squares = sum_of<Team>(p.sums + p.slabs, p.slabs, scratch);  // of C_ii
  const double off_sum = inner / (static_cast<double>(p.n) * p.n) - squares;
  store_terms<Team>(off_sum, p.sums, p.slabs, p.lambd, p.scale, p.loss, p.on_diag, p.off_diag, scratch);
}

// Everything after the product of one (tile, view, slice), by the team whose registers hold it.
// Product: Multiply, or what has its names.
template <class Product>
BARLOW_DEVICE void finish_gram(const Gram& p, int tiles, int tile, int view, int part, int row, int column,
                               const typename Product::Accumulator& acc, char* shared) {
  Vec16* const to = partial_tile<Product>(p, tiles, tile, view, part);
#pragma unroll
  for (int i = 0; i < Product::ROWS; ++i) {
#pragma unroll
    for (int j = 0; j < Product::COLUMNS; ++j) {
      store(to + (i * Product::COLUMNS + j) * Product::Team::threads, pack(acc[i][j], 0.f));
    }
  }
  complete_gram<Product, 1>(p, tiles, tile, 0, row, column, shared);
}

// The kernel on any GPU from sm_80.
template <class Product>
struct GramKernel {
  using T = typename Product::T;
  struct Params {
    Gram p;
    Operand x[2];
    int tiles, promote_every;
  };
  static constexpr const char* name = "gram";
  static constexpr int threads = Product::threads;
  static constexpr int blocks_per_sm = 1;
  static constexpr int shared_bytes = Product::shared_bytes;
  static constexpr int block = Product::M;

  static BARLOW_DEVICE void run(const Params& params) {
    const Gram& p = params.p;
    const int tile = block_id() % params.tiles;  // tiles run fastest: blocks that run together read the same columns
    const int view = block_id() / params.tiles % 2, part = block_id() / (2 * params.tiles);
    int row, column;
    lower_triangle_tile(tile, row, column);
    row *= block;
    column *= block;
    const int slice = p.steps * Product::K;
    typename Product::Accumulator acc;
    Product::run(acc, params.x[view], params.x[view], row, column, part * slice, smaller((part + 1) * slice, p.d),
                 params.promote_every);

    finish_gram<Product>(p, params.tiles, tile, view, part, row, column, acc, shared_memory());
  }
};

}  // namespace barlow
