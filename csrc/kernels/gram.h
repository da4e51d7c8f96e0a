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
#include "blocks/tile.h"

namespace barlow {

// (row, column) of a tile of a lower triangle, counted row by row.
BARLOW_DEVICE void lower_triangle_tile(int tile, int& row, int& column) {
  row = static_cast<int>((sqrtf(8.f * tile + 1.f) - 1.f) * 0.5f);
  if (row * (row + 1) / 2 > tile) --row;  // the root is rounded
  if ((row + 1) * (row + 2) / 2 <= tile) ++row;
  column = tile - row * (row + 1) / 2;
}

// The partial tiles of one view that are to be added, in this order: this thread's first numbers in each of them.
struct Slices {
  const Vec16* first;
  int count;
};

// Fragments [begin, end) of K_a and K_b: adds up the slices, writes both triangles of K, and returns this thread's part
// of the inner product. A fragment lies Team::threads after the one before, slices are `stride` apart. MOST: fragments.
template <class Product, int MOST>
BARLOW_DEVICE double add_slices(const Gram& p, const Slices (&views)[2], int64_t stride, int begin, int end, int row,
                                int column) {
  // So many fragments and slices of both views are on their way at once: 16 loads of 16 bytes a thread.
  constexpr int fragments = smaller(4, MOST), slices = 8 / fragments;
  using T = typename Product::T;
  const float by_d = 1.f / p.d, by_n = 1.f / p.n;
  const bool pairs = sizeof(T) == 2 && p.k.row_stride % 2 == 0 && reinterpret_cast<uintptr_t>(p.k.data) % 4 == 0;
  double sum = 0;
#pragma unroll 1
  for (int f = begin; f < end; f += fragments) {
    float k[2][fragments][4];
#pragma unroll
    for (int view = 0; view < 2; ++view) {
#pragma unroll
      for (int i = 0; i < fragments; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) k[view][i][e] = 0.f;
      }
    }
#pragma unroll 1
    for (int s = 0; s < larger(views[0].count, views[1].count); s += slices) {
      Vec16 v[2][slices][fragments];
#pragma unroll
      for (int view = 0; view < 2; ++view) {
#pragma unroll
        for (int j = 0; j < slices; ++j) {
#pragma unroll
          for (int i = 0; i < fragments; ++i) {
            const bool there = s + j < views[view].count && f + i < end;
            const Vec16* const from = views[view].first + (s + j) * stride + (f + i) * Product::Team::threads;
            v[view][j][i] = there ? load_from_l2(from) : Vec16{};
          }
        }
      }
#pragma unroll
      for (int view = 0; view < 2; ++view) {
#pragma unroll
        for (int j = 0; j < slices; ++j) {
#pragma unroll
          for (int i = 0; i < fragments; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) k[view][i][e] += bits_to_float(v[view][j][i].word[e]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < fragments; ++i) {
      if (f + i >= end) break;
      const int m = row + Product::row_of((f + i) / Product::COLUMNS);
      const int n = column + Product::column_of((f + i) % Product::COLUMNS);
      const int first_m = m - lane() / 4, first_n = n - lane() % 4 * 2;  // of the warp's 16 x 8
      if (first_m > first_n + 7 && first_m + 16 <= p.n && pairs) {
        // All below the diagonal. What is there counts twice, for the triangle that is not computed.
#pragma unroll
        for (int e = 0; e < 4; ++e) sum += 2. * (static_cast<double>(k[0][i][e]) * static_cast<double>(k[1][i][e]));
        if (p.k.data == nullptr) continue;
        const float shift = -p.shift * by_n;
#pragma unroll
        for (int view = 0; view < 2; ++view) {
          T* const to = static_cast<T*>(p.k.data) + view * p.n * p.k.row_stride;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float x[2] = {k[view][i][2 * h] * by_d - shift, k[view][i][2 * h + 1] * by_d - shift};
            store_two(to + (m + 8 * h) * p.k.row_stride + n, x);
            // Neighbouring rows exchange a number: each then has two that are neighbours in the other triangle.
            const bool odd = (lane() & 4) != 0;
            const float taken = shuffle_xor(odd ? x[0] : x[1], 4);
            const float across[2] = {odd ? taken : x[0], odd ? x[1] : taken};
            store_two(to + (n + odd) * p.k.row_stride + (m + 8 * h - odd), across);
          }
        }
        continue;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t me = m + e / 2 * 8, ne = n + e % 2;
        if (me < ne || me >= p.n) continue;
        sum += static_cast<double>(k[0][i][e]) * static_cast<double>(k[1][i][e]) * (me > ne ? 2. : 1.);
        if (p.k.data == nullptr) continue;
        const float shift = p.shift * ((me == ne ? 1.f : 0.f) - by_n);
#pragma unroll
        for (int view = 0; view < 2; ++view) {
          T* const to = static_cast<T*>(p.k.data) + view * p.n * p.k.row_stride;
          to[me * p.k.row_stride + ne] = to[ne * p.k.row_stride + me] = from_float<T>(k[view][i][e] * by_d - shift);
        }
      }
    }
  }
  return sum;
}

// When a team has added up the id-th of `all` parts of K: the last to come here computes the terms.
// shared: 512 bytes of shared memory.
template <class Team>
BARLOW_DEVICE void complete_gram(const Gram& p, int id, int all, double sum, char* shared) {
  double* const scratch = reinterpret_cast<double*>(shared);
  sum = block_sum<Team>(sum, scratch);
  if (thread() == 0) p.inner[id] = sum;
  if (!last_to_arrive<Team>(p.counters + all, all, reinterpret_cast<int*>(scratch + Team::threads / 32))) return;
  const double inner = sum_of<Team>(p.inner, all, scratch);                 // <K_a, K_b>
  const double squares = sum_of<Team>(p.sums + p.slabs, p.slabs, scratch);  // of C_ii
  const double off_sum = inner / (static_cast<double>(p.n) * p.n) - squares;
  store_terms<Team>(off_sum, p.sums, p.slabs, p.lambd, p.scale, p.loss, p.on_diag, p.off_diag, scratch);
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
BARLOW_DEVICE void finish_piece(const Gram& p, int tiles, int tile, int piece, int row, int column, char* shared) {
  using Team = typename Product::Team;
  constexpr int fragments = Product::ROWS * Product::COLUMNS / PIECES;
  const int id = tile * PIECES + piece;
  if (!last_to_arrive<Team>(p.counters + id, 2 * p.split, reinterpret_cast<int*>(shared))) return;
  const Slices views[2] = {{partial_tile<Product>(p, tiles, tile, 0, 0), p.split},
                           {partial_tile<Product>(p, tiles, tile, 1, 0), p.split}};
  const int64_t stride = 2 * (views[1].first - views[0].first);
  const int begin = piece * fragments;
  const double sum = add_slices<Product, fragments>(p, views, stride, begin, begin + fragments, row, column);
  complete_gram<Team>(p, id, tiles * PIECES, sum, shared);
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
  finish_piece<Product, 1>(p, tiles, tile, 0, row, column, shared);
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
