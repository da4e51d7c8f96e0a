// input_grad.h: from a product P to the gradients dL/dz, through the batch norm: what both routes' epilogues share.
//
// For view a, with own = A_hat and other = B_hat, both routes end in one combination of three numbers an element,
//
//     grad = weight_p * P + weight_y * other + weight_x * own
//
// whose weights belong to the feature, that is, to a thread's columns: it works them out once and then walks over rows.
// In half precision the epilogue standardises z once more (raw) instead of reading A_hat and B_hat: with c near 1 the
// gradient holds the small difference of d B_hat and d c A_hat, which their rounding would drown. Standardising is a
// multiplication and an addition, so `other` costs nothing: weight_y and an offset take it in.
#pragma once

#include "blocks/reduce.h"
#include "blocks/tile.h"

namespace barlow {

// The gradients with respect to the two sums, on_diag and off_diag; nullptr is zero.
struct SumWeights {
  float on, off;
};
BARLOW_DEVICE SumWeights weights_of_sums(const InputGrad& p) {
  SumWeights w{0.f, 0.f};
  if (p.g_on != nullptr) w.on += *p.g_on;
  if (p.g_off != nullptr) w.off += *p.g_off;
  if (p.g_loss != nullptr) {
    w.on += *p.g_loss * p.scale;
    w.off += *p.g_loss * p.scale * p.lambd;
  }
  return w;
}

// Of each of a thread's E features; y is what is read for other, x for own: z where raw.
template <int E>
struct Combination {
  float weight_p[E];
  float weight_y[E], offset_y[E];  // of y: includes its standardisation
  float scale_x[E], offset_x[E];   // own = x * scale_x + offset_x
  float weight_x[E];               // of own

  // Everything but weight_x, from what multiplies P and other in rstd * (p P + d other).
  BARLOW_DEVICE void set(const InputGrad& p, int view, int column, const float (&p_weight)[E], const float (&d)[E]) {
    float rstd[E] = {}, mean[E] = {}, rstd_y[E] = {}, mean_y[E] = {};
    if (p.normalized) {
      load_stat(p.stats, stat_rstd + view, p.d, column, rstd);
      load_stat(p.stats, stat_mean + view, p.d, column, mean);
      load_stat(p.stats, stat_rstd + 1 - view, p.d, column, rstd_y);
      load_stat(p.stats, stat_mean + 1 - view, p.d, column, mean_y);
    }
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const float r = p.normalized ? rstd[e] : 1.f;
      weight_p[e] = r * p_weight[e];
      weight_y[e] = r * d[e] * (p.raw ? rstd_y[e] : 1.f);
      offset_y[e] = p.raw ? -weight_y[e] * mean_y[e] : 0.f;
      scale_x[e] = p.raw ? rstd[e] : 1.f;
      offset_x[e] = p.raw ? -rstd[e] * mean[e] : 0.f;
      weight_x[e] = 0.f;
    }
  }
};

// The matrices as a view's epilogue sees them.
struct EpilogueMatrices {
  Matrix own, other, grad;
  bool own_vectors, other_vectors, grad_vectors;
};
inline EpilogueMatrices epilogue_matrices(const InputGrad& p, int view) {
  return {p.own[view],
          p.own[1 - view],
          p.grad[view],
          has_vectors(p.own[view]),
          has_vectors(p.own[1 - view]),
          has_vectors(p.grad[view]) && p.grad[view].dtype == p.own[view].dtype};
}

}  // namespace barlow
