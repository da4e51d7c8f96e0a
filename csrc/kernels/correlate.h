// correlate.h: C = A_hat^T B_hat / N, its sums, and the terms of the loss, in one pass over the inputs. One launch.
//
//     reads   z_a, z_b (or A_hat, B_hat) [N, D]; stats and sums of normalize
//     writes  C0 = C with its diagonal 0, [D, D] in the compute dtype (only for a gradient; else C never reaches memory)
//             the row and column sums of C0^2, the means that the batch norm's backward needs, into stats
//             loss, on_diag, off_diag
//     FLOPs   2 N D^2
//     bytes   2 N D numbers, about ceil(D / BLOCK) times through L2; D^2 written; 8 D^2 / BLOCK of partial sums
//
// The idea: half-precision inputs need no standardised copy. The tensor cores multiply z itself, products of halves are
// exact in float32, and the epilogue centres and scales: C_ij = (sum_n a_ni b_nj / N - mu_i mu_j) s_i s_j. That is more
// accurate than rounding A_hat, until mu_i mu_j is so large that the difference cancels: its error is about
// 6e-8 |mu_i mu_j| s_i s_j, and 1e-9 N of that where the tensor cores truncate (multiply.h). Each tile looks at its own
// features and multiplies A_hat and B_hat where that product may exceed raw_limit. float32 inputs, whose products are
// not exact, always take A_hat and B_hat.
//
// The last tile of a row of tiles to finish adds that row's partial sums, the last of a column the column's, the last of
// all the terms: always in the order of the tiles, whoever is last (reduce.h).
#pragma once

#include "blocks/reduce.h"
#include "blocks/tile.h"

namespace barlow {

// Whether the tile at (row, column) multiplies z itself: the largest |mu_i mu_j| s_i s_j of its features decides.
template <class Team, int BLOCK_M, int BLOCK_N>
BARLOW_DEVICE bool multiplies_raw(const Correlate& p, int row, int column, float* scratch) {
  if (p.z_a.data == nullptr) return false;
  float largest[2] = {0.f, 0.f};
#pragma unroll
  for (int view = 0; view < 2; ++view) {
    const int first = view == 0 ? row : column, size = view == 0 ? BLOCK_M : BLOCK_N;
    for (int i = thread(); i < size && first + i < p.d; i += Team::threads) {
      const float* stat = p.stats + first + i;
      const float ratio = fabsf(stat[(stat_mean + view) * static_cast<int64_t>(p.d)] *
                                stat[(stat_rstd + view) * static_cast<int64_t>(p.d)]);
      largest[view] = ratio <= largest[view] ? largest[view] : ratio;  // NaN stays
    }
    largest[view] = block_max<Team>(largest[view], scratch);
  }
  return largest[0] * largest[1] <= p.raw_limit;
}

// A block of features' sums of C0^2 over all columns (view 0) or rows (view 1), from those of each tile.
template <class Team, int BLOCK>
BARLOW_DEVICE void add_partial_sums(const Correlate& p, int view, const float* sums, int tiles, int first) {
  for (int i = thread(); i < BLOCK && first + i < p.d; i += Team::threads) {
    const float* from = sums + first + i;
    float sum = 0.f;
#pragma unroll 8
    for (int t = 0; t < tiles; ++t) sum += load_from_l2(from + static_cast<int64_t>(t) * p.d);
    p.stats[static_cast<int64_t>(stat_product + view) * p.d + first + i] = sum;
  }
}

// When a tile's sums stand in row_sums and `total` is its own: the last tile of a row, of a column and of all adds up
// what the others left. Tiles are M x N; row_sums has the tiles_j sums over columns before the tiles_i sums over rows.
template <class Team, int M, int N>
BARLOW_DEVICE void complete_correlate(const Correlate& p, int tiles_i, int tiles_j, int tile_i, int tile_j,
                                      double total, double* scratch) {
  total = block_sum<Team>(total, scratch);
  if (thread() == 0) p.off_sums[static_cast<int64_t>(tile_i) * tiles_j + tile_j] = total;
  bool last[3];
  arrive<Team, 3>({{p.counters + tile_i, tiles_j},
                   {p.counters + tiles_i + tile_j, tiles_i},
                   {p.counters + tiles_i + tiles_j, tiles_i * tiles_j}},
                  last, reinterpret_cast<int*>(scratch));
  if (p.row_sums != nullptr) {
    if (last[0]) add_partial_sums<Team, M>(p, 0, p.row_sums, tiles_j, tile_i * M);
    const float* over_rows = p.row_sums + static_cast<int64_t>(tiles_j) * p.d;
    if (last[1]) add_partial_sums<Team, N>(p, 1, over_rows, tiles_i, tile_j * N);
  }
  if (last[2]) {
    const double off_sum = sum_of<Team>(p.off_sums, static_cast<int64_t>(tiles_i) * tiles_j, scratch);
    store_terms<Team>(off_sum, p.sums, p.slabs, p.lambd, p.scale, p.loss, p.on_diag, p.off_diag, scratch);
  }
}

// Everything after the product of one tile of C. tile: the product in shared memory; scratch: Team::threads / 32 * N
// floats and as many doubles as the team has warps.
template <class Product>
BARLOW_DEVICE void finish_correlate(const Correlate& p, int tiles, int tile_i, int tile_j, bool raw, const float* tile,
                                    char* scratch) {
  using T = typename Product::T;
  using Team = typename Product::Team;
  using Rows = Tile<T, Product::M, Product::N, Team::threads>;
  constexpr int E = Rows::E;
  const int column = tile_j * Product::N + Rows::first_column();
  const int count = larger(0, smaller(E, p.d - column));
  const bool vectors = p.c.row_stride * sizeof(T) % 16 == 0;
  float mean[E], rstd[E];
  if (raw) {
    load_stat(p.stats, stat_mean + 1, p.d, column, mean);
    load_stat(p.stats, stat_rstd + 1, p.d, column, rstd);
  }
  const float by_n = 1.f / p.n;
  float over_rows[E];
#pragma unroll
  for (int e = 0; e < E; ++e) over_rows[e] = 0.f;
  double total = 0;
  for (int r = Rows::first_row(); r < Product::M; r += Rows::lanes) {  // all threads: a row's are a warp's neighbours
    const int i = tile_i * Product::M + r;
    float c[E], over_columns = 0.f;
    if (i < p.d) {
      Rows::read(tile, r, c);
      const float mean_i = raw ? p.stats[stat_mean * static_cast<int64_t>(p.d) + i] : 0.f;
      const float rstd_i = raw ? p.stats[stat_rstd * static_cast<int64_t>(p.d) + i] : 1.f;
#pragma unroll
      for (int e = 0; e < E; ++e) {
        c[e] *= by_n;
        if (raw) c[e] = (c[e] - mean_i * mean[e]) * (rstd_i * rstd[e]);
        if (e >= count || i == column + e) c[e] = 0.f;
        over_columns += c[e] * c[e];
        over_rows[e] += c[e] * c[e];
      }
      if (p.c.data != nullptr && count > 0) store_row_as<T>(p.c, vectors, i, column, count, c);
    }
    total += over_columns;
    if (p.row_sums != nullptr) {
#pragma unroll
      for (int mask = Rows::groups / 2; mask >= 1; mask /= 2) over_columns += shuffle_xor(over_columns, mask);
      if (thread() % Rows::groups == 0 && i < p.d) p.row_sums[static_cast<int64_t>(tile_j) * p.d + i] = over_columns;
    }
  }
  if (p.row_sums != nullptr) {
    sum_over_rows<Team, Rows::groups>(over_rows, reinterpret_cast<float*>(scratch));
    if (Rows::first_row() == 0) {
#pragma unroll
      for (int e = 0; e < E; ++e) {
        if (e < count) p.row_sums[static_cast<int64_t>(tiles + tile_i) * p.d + column + e] = over_rows[e];
      }
    }
  }
  complete_correlate<Team, Product::M, Product::N>(p, tiles, tiles, tile_i, tile_j, total,
                                                   reinterpret_cast<double*>(scratch));
}

}  // namespace barlow
