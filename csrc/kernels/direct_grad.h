// direct_grad.h: one view's input gradient in the direct route, from A_hat, B_hat and C0. One launch a view.
//
// For view a, with own = A_hat and other = B_hat (b: exchanged, and C0 transposed):
//
//     P     = B_hat C0^T                                                             [N, D]
//     grad  = rstd (alpha P + d other - kappa m own),     m = alpha mean_n(own P) + d c
//     alpha = (2 / N) w_off,     d = (2 / N) w_on (c - 1)
//
//     reads   z_a, z_b, B_hat [N, D], C0 [D, D], stats; the gradients of the terms
//     writes  the gradient [N, D], in the inputs' dtype and strides
//     FLOPs   2 N D^2
//     bytes   N D + D^2 numbers for the product, through L2; 2 N D read and N D written by the epilogue
//
// The idea: mean_n(A_hat_ni P_ni) = sum_j C0_ij^2, which correlate has added up while C was in registers. So every tile
// finishes by itself, and the batch norm's backward costs an epilogue.
#pragma once

#include "blocks/input_grad.h"

namespace barlow {

// What E features' P, other and own are multiplied with.
template <int E>
BARLOW_DEVICE void direct_weights(const InputGrad& p, int view, int column, Combination<E>& w) {
  const SumWeights weights = weights_of_sums(p);
  const float two_by_n = 2.f / p.n;
  float c[E], alpha[E], d[E];
  load_stat(p.stats, stat_c, p.d, column, c);
#pragma unroll
  for (int e = 0; e < E; ++e) {
    alpha[e] = two_by_n * weights.off;
    d[e] = two_by_n * weights.on * (c[e] - 1.f);
  }
  w.set(p, view, column, alpha, d);
  if (p.normalized) {
    float kappa[E], rstd[E], product[E];
    load_stat(p.stats, stat_kappa + view, p.d, column, kappa);
    load_stat(p.stats, stat_rstd + view, p.d, column, rstd);
    load_stat(p.stats, stat_product + view, p.d, column, product);
#pragma unroll
    for (int e = 0; e < E; ++e) w.weight_x[e] = -rstd[e] * kappa[e] * (alpha[e] * product[e] + d[e] * c[e]);
  }
}

// A tile of P in shared memory becomes a tile of the gradient.
template <class Product>
BARLOW_DEVICE void finish_direct_grad(const InputGrad& p, const EpilogueMatrices& m, int view, const float* tile,
                                      int first_row, int first_column) {
  using T = typename Product::T;
  using Rows = Tile<T, Product::M, Product::N, Product::Team::threads>;
  constexpr int E = Rows::E;
  const int column = first_column + Rows::first_column();
  const int count = larger(0, smaller(E, p.d - column));
  if (count == 0) return;
  Combination<E> w;
  direct_weights(p, view, column, w);
  for (int r = Rows::first_row(); r < Product::M && first_row + r < p.n; r += Rows::lanes) {
    const int64_t row = first_row + r;
    float g[E], x[E];
    Rows::read(tile, r, g);
    load_row<T>(m.other, m.other_vectors, row, column, count, x);
#pragma unroll
    for (int e = 0; e < E; ++e) g[e] = w.weight_p[e] * g[e] + (w.weight_y[e] * x[e] + w.offset_y[e]);
    if (p.normalized) {
      load_row<T>(m.own, m.own_vectors, row, column, count, x);
#pragma unroll
      for (int e = 0; e < E; ++e) g[e] += (x[e] * w.scale_x[e] + w.offset_x[e]) * w.weight_x[e];
    }
    store_row_as<T>(m.grad, m.grad_vectors, row, column, count, g);
  }
}

}  // namespace barlow
