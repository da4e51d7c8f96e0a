// gram_grad.h: the input gradients of the Gram route, from A_hat, B_hat and K. One launch for both views.
//
// For view a, with own = A_hat, other = B_hat, and one number a feature for everything but own, other and P:
//
//     P     = (K_b / D - shift (I - 1 1^T / N)) A_hat                                [N, D]
//     q     = rstd (alpha P + d other)
//     grad  = q + (rstd alpha shift - kappa m) own
//     m     = mean_n(own q) + rstd alpha shift mean_n(own^2)
//     alpha = w_off (2 / N) (D / N),    d = (2 / N) (w_on (c - 1) - w_off c)
//
//     reads   z_a, z_b, A_hat, B_hat [N, D], K [2 N, N], stats; the gradients of the terms
//     writes  both gradients [N, D], in the inputs' dtype and strides
//     FLOPs   4 N^2 D for both views
//     bytes   6 N D numbers read in half precision (4 N D in float32), K from L2, 2 N D written; with several row tiles
//             6 N D more, below
//
// The idea: mean_n(own q) needs all samples of a feature before one number of its gradient is known. So a block owns a
// slab of columns with all N rows. Up to M samples, P waits in shared memory. Beyond, the block walks over row tiles: it
// adds up own q, stores as the gradient q and every multiple of own that is already known (of mean_n(own q), that is
// rstd d c), and when the sums are complete walks over the slab again and adds the missing multiple of own to what it
// stored. The second walk reads own and grad and writes grad, 3 N D numbers a view, against 2 N^2 D FLOPs, and finds a
// part of them in L2. Computing P twice would cost 2 N^2 D FLOPs a view, a float32 P in memory 8 N D bytes.
//
// Without normalization there is no mean: each row tile is finished at once.
#pragma once

#include "blocks/input_grad.h"

namespace barlow {

// What E features' P, other and own are multiplied with.
template <int E>
struct GramWeights {
  Combination<E> w;
  float known[E];  // rstd d c: of mean_n(own q)
  float kappa[E];

  BARLOW_DEVICE void set(const InputGrad& p, int view, int column) {
    const SumWeights weights = weights_of_sums(p);
    const float two_by_n = 2.f / p.n;
    float c[E], alpha[E], d[E], square[E], rstd[E];
    load_stat(p.stats, stat_c, p.d, column, c);
#pragma unroll
    for (int e = 0; e < E; ++e) {
      alpha[e] = weights.off * two_by_n * (static_cast<float>(p.k_divisor) / p.n);
      d[e] = two_by_n * (weights.on * (c[e] - 1.f) - weights.off * c[e]);
      known[e] = kappa[e] = 0.f;
    }
    w.set(p, view, column, alpha, d);
    if (p.normalized) {
      load_stat(p.stats, stat_kappa + view, p.d, column, kappa);
      load_stat(p.stats, stat_square + view, p.d, column, square);
      load_stat(p.stats, stat_rstd + view, p.d, column, rstd);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        known[e] = rstd[e] * d[e] * c[e];
        w.weight_x[e] = rstd[e] * alpha[e] * (1.f - kappa[e] * square[e]) - kappa[e] * known[e];
      }
    }
  }
};

// What a team knows of its slab of features while it walks over the row tiles.
template <class Product>
struct GramSlab {
  using T = typename Product::T;
  using Team = typename Product::Team;
  using Rows = Tile<T, Product::M, Product::N, Team::threads>;
  static constexpr int E = Rows::E;
  static constexpr int scratch_bytes = Team::threads / 32 * Product::N * 4;

  GramWeights<E> weights;
  float own_sum[E];   // of own q, this thread's rows
  int column, count;  // this thread's features

  BARLOW_DEVICE void begin(const InputGrad& p, int view, int slab_column) {
    column = slab_column + Rows::first_column();
    count = larger(0, smaller(E, p.d - column));
    weights.set(p, view, column);
#pragma unroll
    for (int e = 0; e < E; ++e) own_sum[e] = 0.f;
  }

  // A row tile of P: adds up own q, and stores the gradient but for what is not known of the mean (STORE).
  template <bool SUM, bool STORE>
  BARLOW_DEVICE void rows(const InputGrad& p, const EpilogueMatrices& m, const float* tile, int first_row) {
    if (count == 0) return;
    Combination<E>& w = weights.w;
    for (int r = Rows::first_row(); r < Product::M && first_row + r < p.n; r += Rows::lanes) {
      const int64_t row = first_row + r;
      float q[E], x[E];
      Rows::read(tile, r, q);
      load_row<T>(m.other, m.other_vectors, row, column, count, x);
#pragma unroll
      for (int e = 0; e < E; ++e) q[e] = w.weight_p[e] * q[e] + (w.weight_y[e] * x[e] + w.offset_y[e]);
      if (p.normalized) {
        load_row<T>(m.own, m.own_vectors, row, column, count, x);
#pragma unroll
        for (int e = 0; e < E; ++e) {
          x[e] = x[e] * w.scale_x[e] + w.offset_x[e];
          if constexpr (SUM) own_sum[e] += x[e] * q[e];
          q[e] += x[e] * w.weight_x[e];
        }
      }
      if constexpr (STORE) store_row_as<T>(m.grad, m.grad_vectors, row, column, count, q);
    }
  }

  // What own is still to be multiplied with, when all rows have been added up.
  BARLOW_DEVICE void finish_mean(const InputGrad& p, float* scratch) {
    sum_over_rows<Team, Rows::groups>(own_sum, scratch);
#pragma unroll
    for (int e = 0; e < E; ++e) own_sum[e] = -weights.kappa[e] * (own_sum[e] / p.n - weights.known[e]);
  }

  // All rows are still in one tile: the mean goes into what is stored once.
  BARLOW_DEVICE void complete() {
#pragma unroll
    for (int e = 0; e < E; ++e) weights.w.weight_x[e] += own_sum[e];
  }

  // The second walk. Each thread reads what it has stored itself.
  BARLOW_DEVICE void add_own(const InputGrad& p, const EpilogueMatrices& m) {
    if (count == 0) return;
    const Combination<E>& w = weights.w;
    for (int64_t row = Rows::first_row(); row < p.n; row += Rows::lanes) {
      float g[E], x[E];
      load_row_as<T>(m.grad, m.grad_vectors, row, column, count, g);
      load_row<T>(m.own, m.own_vectors, row, column, count, x);
#pragma unroll
      for (int e = 0; e < E; ++e) g[e] += (x[e] * w.scale_x[e] + w.offset_x[e]) * own_sum[e];
      store_row_as<T>(m.grad, m.grad_vectors, row, column, count, g);
    }
  }
};

}  // namespace barlow
