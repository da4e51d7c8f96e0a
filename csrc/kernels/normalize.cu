// normalize: every feature's mean and variance, A_hat and B_hat, and c = diag(C), from z_a and z_b. One launch, or two.
//
//     reads   z_a, z_b                        2 N D numbers, once (a slab fits on chip) or twice (two phases)
//     writes  A_hat, B_hat                    2 N D numbers; nothing where nothing is standardised
//             stats [11, D] float32           the rows that kernels.h names
//             sums [2, slabs] float64         each slab's sums of (c_i - 1)^2, the on-diagonal term, and of c_i^2
//             counters                        zeros, for the kernel that comes next
//     FLOPs   about 16 N D; the bytes are what it costs
//
// The idea: a block holds all N samples of a slab of features of both views in shared memory. So the variance is the mean
// of squares around the mean that was just computed, A_hat and c cost no second look at memory, and nothing is rounded to
// the inputs' dtype before c is known. Beyond what shared memory holds, chunks of rows do the same, and their moments are
// combined by Chan's formula in a fixed order: first all chunks' moments, then, from these, A_hat.
//
// A thread owns 16 bytes of a row and every (threads / GROUPS)-th row. It copies them (cp.async), and only itself ever
// reads them again: shared memory is its larger register file, without a bank conflict or a barrier.
//
// Every feature is first shifted by its own first sample, which is exact where samples are close to one another. What is
// left has a mean of the size of its deviation, so a feature with |mean| / deviation = 1e3 loses nothing in float32, and
// a constant one is exactly 0.
#include "blocks/reduce.h"
#include "blocks/tile.h"

namespace barlow {
namespace {

constexpr int normalize_threads = 256;

// How the features are cut: GROUPS times 16 bytes of a row to a block, `rows` rows at a time.
struct SlabLayout {
  int groups, rows, chunks;
};

BARLOW_HOST_DEVICE constexpr int scratch_bytes(int groups) { return normalize_threads / 32 * groups * 8 * 4; }
BARLOW_HOST_DEVICE constexpr int slab_bytes(int rows, int groups) {
  return 2 * round_up(rows, normalize_threads / groups) * groups * 16;
}

SlabLayout slab_layout(int n, int d, int size, int device) {
  const DeviceInfo& info = device_info(device);
  for (const int groups : {8, 4, 2}) {
    // Wide slabs read longer pieces of a row; narrow ones fill the chip.
    const bool fills = ceil_div(d, groups * 16 / size) >= info.multiprocessors * groups / 4;
    if ((fills || groups == 2) && slab_bytes(n, groups) + scratch_bytes(groups) <= info.shared_bytes) {
      return {groups, n, 1};
    }
  }
  return {8, 256, ceil_div(n, 256)};
}

struct NormalizeParams {
  Normalize p;
  bool a_vectors, b_vectors, hat_vectors;
  int rows;  // of a chunk
};

template <int E>
struct Moments {
  float mean_a[E], mean_b[E];        // less the shift
  float m2_a[E], m2_b[E], cross[E];  // sums of squares and of products around the means
};

// A thread's features, and its rows of a slab.
template <class T, int GROUPS>
struct Slab {
  using Team = WholeBlock<normalize_threads>;
  static constexpr int E = per_vec<T>;
  static constexpr int lanes = normalize_threads / GROUPS;
  int slab, chunk, column, count, begin, end;
  Vec16* own[2];  // of each view: this thread's numbers in shared memory
  float shift[2][E];

  BARLOW_DEVICE Slab(const NormalizeParams& params) {
    const Normalize& p = params.p;
    slab = block_id() % p.slabs;
    chunk = block_id() / p.slabs;
    column = (slab * GROUPS + thread() % GROUPS) * E;
    count = larger(0, smaller(E, p.d - column));
    begin = chunk * params.rows;
    end = smaller(begin + params.rows, p.n);
    Vec16* const shared = reinterpret_cast<Vec16*>(shared_memory() + scratch_bytes(GROUPS)) + thread();
    own[0] = shared;
    own[1] = shared + ceil_div(params.rows, lanes) * normalize_threads;
    load_row<T>(p.z_a, params.a_vectors, 0, column, p.normalized ? count : 0, shift[0]);
    load_row<T>(p.z_b, params.b_vectors, 0, column, p.normalized ? count : 0, shift[1]);
  }

  BARLOW_DEVICE float* scratch() const { return reinterpret_cast<float*>(shared_memory()); }

  // Copies this thread's rows.
  BARLOW_DEVICE void copy(const NormalizeParams& params) {
#pragma unroll
    for (int view = 0; view < 2; ++view) {
      const Matrix& z = view == 0 ? params.p.z_a : params.p.z_b;
      const bool vectors = view == 0 ? params.a_vectors : params.b_vectors;
      Vec16* to = own[view];
      for (int row = begin + thread() / GROUPS; row < end; row += lanes, to += normalize_threads) {
        if (vectors && count == E) {
          copy_async(to, static_cast<const T*>(z.data) + row * z.row_stride + column, 16);
        } else {
          float x[E];
          load_row<T>(z, false, row, column, count, x);
          store(to, pack(x, T{}));
        }
      }
    }
    copy_async_commit();
    copy_async_wait<0>();
  }

  // Calls f(row, a, b) for this thread's rows, less the shifts.
  template <class F>
  BARLOW_DEVICE void for_rows(F f) const {
    const Vec16 *from_a = own[0], *from_b = own[1];
    for (int row = begin + thread() / GROUPS; row < end; row += lanes) {
      float a[E], b[E];
      unpack(load(from_a), a, T{});
      unpack(load(from_b), b, T{});
#pragma unroll
      for (int e = 0; e < E; ++e) {
        a[e] -= shift[0][e];
        b[e] -= shift[1][e];
      }
      f(row, a, b);
      from_a += normalize_threads;
      from_b += normalize_threads;
    }
  }

  BARLOW_DEVICE Moments<E> moments(bool centred) const {
    Moments<E> m;
    float rest_a[E], rest_b[E];  // what rounding left of the means
#pragma unroll
    for (int e = 0; e < E; ++e) {
      m.mean_a[e] = m.mean_b[e] = m.m2_a[e] = m.m2_b[e] = m.cross[e] = rest_a[e] = rest_b[e] = 0.f;
    }
    const float rows = static_cast<float>(end - begin);
    if (centred) {
      for_rows([&](int, const float (&a)[E], const float (&b)[E]) {
#pragma unroll
        for (int e = 0; e < E; ++e) {
          m.mean_a[e] += a[e];
          m.mean_b[e] += b[e];
        }
      });
      sum_over_rows<Team, GROUPS>(m.mean_a, scratch());
      sum_over_rows<Team, GROUPS>(m.mean_b, scratch());
#pragma unroll
      for (int e = 0; e < E; ++e) {
        m.mean_a[e] /= rows;
        m.mean_b[e] /= rows;
      }
    }
    for_rows([&](int, const float (&a)[E], const float (&b)[E]) {
#pragma unroll
      for (int e = 0; e < E; ++e) {
        const float x = a[e] - m.mean_a[e], y = b[e] - m.mean_b[e];
        rest_a[e] += x;
        rest_b[e] += y;
        m.m2_a[e] += x * x;
        m.m2_b[e] += y * y;
        m.cross[e] += x * y;
      }
    });
    sum_over_rows<Team, GROUPS>(m.cross, scratch());
    if (centred) {
      sum_over_rows<Team, GROUPS>(rest_a, scratch());
      sum_over_rows<Team, GROUPS>(rest_b, scratch());
      sum_over_rows<Team, GROUPS>(m.m2_a, scratch());
      sum_over_rows<Team, GROUPS>(m.m2_b, scratch());
#pragma unroll
      for (int e = 0; e < E; ++e) {
        m.m2_a[e] = larger(0.f, m.m2_a[e] - rest_a[e] * rest_a[e] / rows);
        m.m2_b[e] = larger(0.f, m.m2_b[e] - rest_b[e] * rest_b[e] / rows);
        m.cross[e] -= rest_a[e] * rest_b[e] / rows;
        m.mean_a[e] += rest_a[e] / rows;
        m.mean_b[e] += rest_b[e] / rows;
      }
    }
    return m;
  }
};

// normalization.py's table, from a feature's sum of squares.
BARLOW_DEVICE void rstd_and_kappa(const Normalize& p, float m2, float& rstd, float& kappa) {
  const float n = static_cast<float>(p.n);
  const float var = m2 / (n - p.correction);
  kappa = n / (n - p.correction);
  if (p.eps_in_root) {
    rstd = 1.f / sqrtf(var + p.eps);
  } else {
    const float std = sqrtf(var);
    rstd = 1.f / (std + p.eps);
    kappa = std == 0.f ? 0.f : kappa * ((std + p.eps) / std);
  }
}

// From all samples' moments to the stats, the sums and what standardises: x_hat = (x - shift - mean) * rstd.
// Every block of a slab computes them, the first stores them.
template <class T, int GROUPS>
BARLOW_DEVICE void finish_stats(const Normalize& p, const Slab<T, GROUPS>& slab, const Moments<per_vec<T>>& m,
                                float (&rstd_a)[per_vec<T>], float (&rstd_b)[per_vec<T>]) {
  constexpr int E = per_vec<T>;
  const bool stores = slab.chunk == 0 && thread() / GROUPS == 0;
  const int64_t d = p.d;
  double on_sum = 0, squares = 0;
#pragma unroll
  for (int e = 0; e < E; ++e) {
    float kappa_a = 0.f, kappa_b = 0.f, c = m.cross[e] / p.n;
    rstd_a[e] = rstd_b[e] = 1.f;
    if (p.normalized) {
      rstd_and_kappa(p, m.m2_a[e], rstd_a[e], kappa_a);
      rstd_and_kappa(p, m.m2_b[e], rstd_b[e], kappa_b);
      c = m.cross[e] * rstd_a[e] * rstd_b[e] / p.n;
    }
    if (stores && e < slab.count) {
      float* const stat = p.stats + slab.column + e;
      stat[stat_c * d] = c;
      if (p.normalized) {
        stat[stat_mean * d] = slab.shift[0][e] + m.mean_a[e];
        stat[(stat_mean + 1) * d] = slab.shift[1][e] + m.mean_b[e];
        stat[stat_rstd * d] = rstd_a[e];
        stat[(stat_rstd + 1) * d] = rstd_b[e];
        stat[stat_kappa * d] = kappa_a;
        stat[(stat_kappa + 1) * d] = kappa_b;
        stat[stat_square * d] = m.m2_a[e] * rstd_a[e] * rstd_a[e] / p.n;
        stat[(stat_square + 1) * d] = m.m2_b[e] * rstd_b[e] * rstd_b[e] / p.n;
      }
      on_sum += (static_cast<double>(c) - 1) * (static_cast<double>(c) - 1);
      squares += static_cast<double>(c) * c;
    }
  }
  if (slab.chunk != 0) return;
  using Team = typename Slab<T, GROUPS>::Team;
  double* const scratch = reinterpret_cast<double*>(slab.scratch());
  on_sum = block_sum<Team>(on_sum, scratch);
  squares = block_sum<Team>(squares, scratch);
  if (thread() == 0) {
    p.sums[slab.slab] = on_sum;
    p.sums[p.slabs + slab.slab] = squares;
  }
  const int share = ceil_div(p.counter_count, p.slabs), first = slab.slab * share;
  for (int i = thread(); i < share && first + i < p.counter_count; i += normalize_threads) p.counters[first + i] = 0;
}

// A row of A_hat and of B_hat.
template <class T, int GROUPS>
BARLOW_DEVICE void store_hats(const NormalizeParams& params, const Slab<T, GROUPS>& slab, const Moments<per_vec<T>>& m,
                              const float (&rstd_a)[per_vec<T>], const float (&rstd_b)[per_vec<T>], int row,
                              float (&a)[per_vec<T>], float (&b)[per_vec<T>]) {
#pragma unroll
  for (int e = 0; e < per_vec<T>; ++e) {
    a[e] = (a[e] - m.mean_a[e]) * rstd_a[e];
    b[e] = (b[e] - m.mean_b[e]) * rstd_b[e];
  }
  store_row_as<T>(params.p.a_hat, params.hat_vectors, row, slab.column, slab.count, a);
  store_row_as<T>(params.p.b_hat, params.hat_vectors, row, slab.column, slab.count, b);
}

// All samples at once.
template <class T, int GROUPS>
struct NormalizeKernel {
  using Params = NormalizeParams;
  static constexpr const char* name = "normalize";
  static constexpr int threads = normalize_threads;
  static constexpr int blocks_per_sm = 1;

  static BARLOW_DEVICE void run(const Params& params) {
    Slab<T, GROUPS> slab(params);
    slab.copy(params);
    const Moments<per_vec<T>> m = slab.moments(params.p.normalized);
    float rstd_a[per_vec<T>], rstd_b[per_vec<T>];
    finish_stats(params.p, slab, m, rstd_a, rstd_b);
    if (!params.p.normalized) return;
    slab.for_rows([&](int row, float (&a)[per_vec<T>], float (&b)[per_vec<T>]) {
      store_hats<T>(params, slab, m, rstd_a, rstd_b, row, a, b);
    });
  }
};

// First phase: one chunk's moments.
template <class T>
struct MomentsKernel {
  using Params = NormalizeParams;
  static constexpr const char* name = "normalize, moments";
  static constexpr int threads = normalize_threads;
  static constexpr int blocks_per_sm = 1;

  static BARLOW_DEVICE void run(const Params& params) {
    constexpr int groups = 8, E = per_vec<T>;
    Slab<T, groups> slab(params);
    slab.copy(params);
    const Moments<E> m = slab.moments(params.p.normalized);
    if (thread() / groups != 0) return;
    const int64_t d = params.p.d;
    float* const out = params.p.partials + slab.chunk * 5 * d + slab.column;
#pragma unroll
    for (int e = 0; e < E; ++e) {
      if (e >= slab.count) continue;
      out[e] = m.mean_a[e];
      out[d + e] = m.mean_b[e];
      out[2 * d + e] = m.m2_a[e];
      out[3 * d + e] = m.m2_b[e];
      out[4 * d + e] = m.cross[e];
    }
  }
};

// Second phase: all chunks' moments combined, and one chunk standardised.
template <class T>
struct ApplyMomentsKernel {
  using Params = NormalizeParams;
  static constexpr const char* name = "normalize, apply";
  static constexpr int threads = normalize_threads;
  static constexpr int blocks_per_sm = 1;

  static BARLOW_DEVICE void run(const Params& params) {
    constexpr int groups = 8, E = per_vec<T>;
    const Normalize& p = params.p;
    const Slab<T, groups> slab(params);
    Moments<E> m;
#pragma unroll
    for (int e = 0; e < E; ++e) m.mean_a[e] = m.mean_b[e] = m.m2_a[e] = m.m2_b[e] = m.cross[e] = 0.f;
    float rows = 0.f;
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      const float here = static_cast<float>(smaller(params.rows, p.n - chunk * params.rows));
      const float share = here / (rows + here), weight = rows * share;
      const float* const from = p.partials + chunk * 5 * static_cast<int64_t>(p.d);
      float mean_a[E], mean_b[E], m2_a[E], m2_b[E], cross[E];
      load_stat(from, 0, p.d, slab.column, mean_a);
      load_stat(from, 1, p.d, slab.column, mean_b);
      load_stat(from, 2, p.d, slab.column, m2_a);
      load_stat(from, 3, p.d, slab.column, m2_b);
      load_stat(from, 4, p.d, slab.column, cross);
#pragma unroll
      for (int e = 0; e < E; ++e) {  // Chan
        const float delta_a = mean_a[e] - m.mean_a[e], delta_b = mean_b[e] - m.mean_b[e];
        m.mean_a[e] += delta_a * share;
        m.mean_b[e] += delta_b * share;
        m.m2_a[e] += m2_a[e] + delta_a * delta_a * weight;
        m.m2_b[e] += m2_b[e] + delta_b * delta_b * weight;
        m.cross[e] += cross[e] + delta_a * delta_b * weight;
      }
      rows += here;
    }
    float rstd_a[E], rstd_b[E];
    finish_stats(p, slab, m, rstd_a, rstd_b);
    if (!p.normalized) return;
    for (int row = slab.begin + thread() / groups; row < slab.end; row += slab.lanes) {
      float a[E], b[E];
      load_row<T>(p.z_a, params.a_vectors, row, slab.column, slab.count, a);
      load_row<T>(p.z_b, params.b_vectors, row, slab.column, slab.count, b);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        a[e] -= slab.shift[0][e];
        b[e] -= slab.shift[1][e];
      }
      store_hats<T>(params, slab, m, rstd_a, rstd_b, row, a, b);
    }
  }
};

template <class T>
void launch_normalize(const NormalizeParams& params, const SlabLayout& layout, Stream stream) {
  const Normalize& p = params.p;
  const int shared = slab_bytes(params.rows, layout.groups) + scratch_bytes(layout.groups);
  if (layout.chunks > 1) {
    const int64_t blocks = static_cast<int64_t>(p.slabs) * layout.chunks;
    launch<MomentsKernel<T>>(blocks, shared, stream, params, p.n, p.d);
    launch<ApplyMomentsKernel<T>>(p.normalized ? blocks : p.slabs, scratch_bytes(8), stream, params, p.n, p.d);
  } else if (layout.groups == 8) {
    launch<NormalizeKernel<T, 8>>(p.slabs, shared, stream, params, p.n, p.d);
  } else if (layout.groups == 4) {
    launch<NormalizeKernel<T, 4>>(p.slabs, shared, stream, params, p.n, p.d);
  } else {
    launch<NormalizeKernel<T, 2>>(p.slabs, shared, stream, params, p.n, p.d);
  }
}

}  // namespace

NormalizePlan plan_normalize(int n, int d, DType dtype, int device) {
  const int size = dtype == DType::float32 ? 4 : 2;
  const SlabLayout layout = slab_layout(n, d, size, device);
  return {ceil_div(d, layout.groups * 16 / size), layout.chunks};
}

void normalize(const Normalize& p, Stream stream) {
  const DType dtype = p.z_a.dtype;
  const SlabLayout layout = slab_layout(p.n, p.d, dtype == DType::float32 ? 4 : 2, stream.device);
  const bool hat_vectors = p.normalized && p.a_hat.dtype == dtype && has_vectors(p.a_hat) && has_vectors(p.b_hat);
  const NormalizeParams params{p, has_vectors(p.z_a), has_vectors(p.z_b), hat_vectors, layout.rows};
  switch (dtype) {
    case DType::float32:
      return launch_normalize<float>(params, layout, stream);
    case DType::bfloat16:
      return launch_normalize<bfloat16>(params, layout, stream);
    case DType::float16:
      return launch_normalize<float16>(params, layout, stream);
  }
}

}  // namespace barlow
