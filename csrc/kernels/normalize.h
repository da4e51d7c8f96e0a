// normalize.h: every feature's mean and variance, A_hat and B_hat, and c = diag(C), from z_a and z_b.
//
//     reads   z_a, z_b                        2 N D numbers, once (a slab fits on chip) or twice (chunks)
//     writes  A_hat, B_hat                    2 N D numbers; nothing where nothing is standardised
//             stats [11, D] float32           the rows that kernels.h names
//             sums [2, slabs] float64         each slab's sums of (c_i - 1)^2, the on-diagonal term, and of c_i^2
//             counters                        zeros, for the kernel that comes next
//     FLOPs   about 16 N D; the bytes are what it costs
//
// The ideas:
//
// * A block, or on Hopper a cluster of blocks, holds all N samples of a slab of features of both views in shared memory.
//   So the variance is the mean of squares around a mean that was just computed, A_hat and c cost no second look at
//   memory, and nothing is rounded to the inputs' dtype before c is known. Blocks of a cluster hold a part of the rows
//   each, and combine their moments by Chan's formula, always in the order of the blocks. Where that does not fit either,
//   chunks of rows do the same through memory, in three launches: moments, combination, A_hat.
// * A thread owns 16 bytes of a row and every (threads / GROUPS)-th row. It copies them (cp.async), and only itself ever
//   reads them again: shared memory is its larger register file, without a bank conflict or a barrier. The first sums are
//   made while later rows are still on their way. Two blocks a multiprocessor: one computes while the other waits.
// * What is said once of a feature, one thread says: square roots, and no division; the others read a centre, a scale
//   and an offset from shared memory.
// * Every feature is first shifted by its own first sample, which is exact where samples are close to one another. What
//   is left has a mean of the size of its deviation; the centre is that mean, put back and rounded, and what rounding
//   took from it is an offset. So a feature with |mean| / deviation = 1e3 loses nothing in float32, and a constant one is
//   exactly 0.
#pragma once

#include "blocks/reduce.h"
#include "blocks/tile.h"

namespace barlow {

constexpr int normalize_threads = 256;
constexpr int chunk_rows = 256;  // where chunks of rows go through memory
constexpr int moment_count = 5;

struct NormalizeParams {
  Normalize p;
  bool a_vectors, b_vectors, hat_vectors;
  int rows;          // of a part
  float by_n;        // 1 / N
  float by_m;        // 1 / (N - correction)
  float by_rows[2];  // 1 / the rows of a part, and of the last one
};

// Of one feature, in one part of the rows or in all: means less the shifts; sums of squares and of products around them.
struct Moments {
  float mean_a = 0.f, mean_b = 0.f, m2_a = 0.f, m2_b = 0.f, cross = 0.f;

  // Chan. rows: those that are in, and those of `other`; by_sum = 1 / (rows + other_rows).
  BARLOW_DEVICE void add(const Moments& other, float rows, float other_rows, float by_sum) {
    const float share = other_rows * by_sum, weight = rows * share;
    const float delta_a = other.mean_a - mean_a, delta_b = other.mean_b - mean_b;
    mean_a += delta_a * share;
    mean_b += delta_b * share;
    m2_a += other.m2_a + delta_a * delta_a * weight;
    m2_b += other.m2_b + delta_b * delta_b * weight;
    cross += other.cross + delta_a * delta_b * weight;
  }
};

// x_hat = (x - centre) * scale + offset
struct Standardising {
  float centre, scale, offset;
};

// A slab's features as a thread sees them: E of them, in every (threads / GROUPS)-th row of a part.
template <class T, int GROUPS>
struct Slab {
  using Team = WholeBlock<normalize_threads>;
  static constexpr int E = per_vec<T>, columns = GROUPS * E, lanes = normalize_threads / GROUPS;
  static constexpr int warps = normalize_threads / 32, batches = 4;

  struct Memory {
    float sums[moment_count][warps][columns];  // each warp's rows
    float moments[moment_count][columns];      // of this part
    float centre[2][columns], scale[2][columns], offset[2][columns];
    double scratch[warps];
  };
  static_assert(sizeof(Memory) % 16 == 0, "vectors come after it");

  const NormalizeParams& params;
  int slab, part, column, count, begin, end;

  // Parts of a slab are neighbouring blocks (parts > 1), or blocks `slabs` apart.
  BARLOW_DEVICE Slab(const NormalizeParams& all, int slab_, int part_) : params(all), slab(slab_), part(part_) {
    const Normalize& p = params.p;
    column = slab * columns + thread() % GROUPS * E;
    count = larger(0, smaller(E, p.d - column));
    begin = part * params.rows;
    end = smaller(begin + params.rows, p.n);
  }

  static BARLOW_HOST_DEVICE constexpr int bytes(int rows) {
    return static_cast<int>(sizeof(Memory)) + 2 * round_up(rows, lanes) * GROUPS * 16;
  }
  BARLOW_DEVICE Memory& memory() const { return *reinterpret_cast<Memory*>(shared_memory()); }
  // This thread's numbers of a view in shared memory, normalize_threads apart.
  BARLOW_DEVICE Vec16* own(int view) const {
    return reinterpret_cast<Vec16*>(shared_memory() + sizeof(Memory)) +
           view * ceil_div(params.rows, lanes) * normalize_threads + thread();
  }
  BARLOW_DEVICE const Matrix& z(int view) const { return view == 0 ? params.p.z_a : params.p.z_b; }
  BARLOW_DEVICE bool vectors(int view) const { return view == 0 ? params.a_vectors : params.b_vectors; }
  BARLOW_DEVICE int rows_of_batch() const { return ceil_div(ceil_div(params.rows, lanes), batches) * lanes; }
  BARLOW_DEVICE float by_rows() const { return params.by_rows[end == params.p.n ? 1 : 0]; }

  // Starts the copies of this thread's rows, in batches.
  BARLOW_DEVICE void copy() const {
    for (int batch = 0; batch < batches; ++batch) {
      const int first = begin + batch * rows_of_batch(), stop = smaller(first + rows_of_batch(), end);
#pragma unroll
      for (int view = 0; view < 2; ++view) {
        const Matrix& from = z(view);
        Vec16* to = own(view) + batch * rows_of_batch() * GROUPS;
        for (int row = first + thread() / GROUPS; row < stop; row += lanes, to += normalize_threads) {
          if (vectors(view) && count == E) {
            copy_async(to, static_cast<const T*>(from.data) + row * from.row_stride + column, 16);
          } else {
            float x[E];
            load_row<T>(from, false, row, column, count, x);
            store(to, pack(x, T{}));
          }
        }
      }
      copy_async_commit();
    }
  }

  // Calls f(x) for this thread's rows [first, stop) of a view.
  template <class F>
  BARLOW_DEVICE void for_rows(int view, int first, int stop, F f) const {
    const Vec16* from = own(view) + (first - begin) * GROUPS;
#pragma unroll 2
    for (int row = first + thread() / GROUPS; row < stop; row += lanes, from += normalize_threads) {
      float x[E];
      unpack(load(from), x, T{});
      f(row, x);
    }
  }

  // A thread's sums of E features become its warp's, and go to memory().sums.
  BARLOW_DEVICE void store_sums(int which, float (&x)[E]) const {
    int first = 0, half = E, copies = 0;  // lanes that hold the same sums differ in `copies`
#pragma unroll
    for (int mask = 16; mask >= GROUPS; mask /= 2) {
      half /= 2;
      if (half > 0) {  // lanes give each other half of what they have
        const bool upper = (lane() & mask) != 0;
#pragma unroll
        for (int i = 0; i < half; ++i) {
          const float given = upper ? x[i] : x[i + half], kept = upper ? x[i + half] : x[i];
          x[i] = kept + shuffle_xor(given, mask);
        }
        if (upper) first += half;
      } else {
        x[0] += shuffle_xor(x[0], mask);
        copies |= mask;
      }
    }
    constexpr int left = larger(1, E * GROUPS / 32);
    if ((lane() & copies) == 0) {
      float* const to = memory().sums[which][warp()] + thread() % GROUPS * E + first;
#pragma unroll
      for (int i = 0; i < left; ++i) to[i] = x[i];
    }
  }
  BARLOW_DEVICE float sum_over_warps(int which, int feature) const {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < warps; ++w) sum += memory().sums[which][w][feature];
    return sum;
  }

  // What a feature is shifted by: its first sample.
  BARLOW_DEVICE float shift(int view, int feature) const {
    const Matrix& from = z(view);
    const int64_t at = slab * columns + feature;
    if (!params.p.normalized || at >= params.p.d) return 0.f;
    return to_float(load(static_cast<const T*>(from.data) + at * from.column_stride));
  }

  BARLOW_DEVICE void load_features(const float (&from)[columns], float (&x)[E]) const {
#pragma unroll
    for (int v = 0; v < E / 4; ++v) {
      const Vec16 four = load(reinterpret_cast<const Vec16*>(from + thread() % GROUPS * E) + v);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[4 * v + i] = bits_to_float(four.word[i]);
    }
  }

  // This part's moments, to memory().moments, a feature's by the thread of that number. All threads; a barrier of the block
  // (or cluster) must follow before another thread reads them.
  BARLOW_DEVICE void part_moments() const {
    Memory& m = memory();
    copy();
    if (params.p.normalized) {
      float first[2][E], sums[2][E];
#pragma unroll
      for (int view = 0; view < 2; ++view) {
        load_row<T>(z(view), vectors(view), 0, column, count, first[view]);
#pragma unroll
        for (int e = 0; e < E; ++e) sums[view][e] = 0.f;
      }
#pragma unroll
      for (int batch = 0; batch < batches; ++batch) {
        batch == 0   ? copy_async_wait<3>()
        : batch == 1 ? copy_async_wait<2>()
        : batch == 2 ? copy_async_wait<1>()
                     : copy_async_wait<0>();
        const int from = begin + batch * rows_of_batch(), stop = smaller(from + rows_of_batch(), end);
#pragma unroll
        for (int view = 0; view < 2; ++view) {
          for_rows(view, from, stop, [&](int, const float (&x)[E]) {
#pragma unroll
            for (int e = 0; e < E; ++e) sums[view][e] += x[e] - first[view][e];
          });
        }
      }
      store_sums(0, sums[0]);
      store_sums(1, sums[1]);
    } else {
      copy_async_wait<0>();
    }
    barrier();
    for (int i = thread(); i < 2 * columns; i += normalize_threads) {
      const int view = i / columns, feature = i % columns;
      m.centre[view][feature] =
          params.p.normalized ? shift(view, feature) + sum_over_warps(view, feature) * by_rows() : 0.f;
    }
    barrier();
    float centre[2][E], rest[2][E], m2[2][E], cross[E];  // rest: what rounding left of the means
#pragma unroll
    for (int view = 0; view < 2; ++view) {
      load_features(m.centre[view], centre[view]);
#pragma unroll
      for (int e = 0; e < E; ++e) rest[view][e] = m2[view][e] = cross[e] = 0.f;
    }
    for_rows(0, begin, end, [&](int row, const float (&a)[E]) {
      float b[E];
      unpack(load(own(1) + (row - begin) / lanes * normalize_threads), b, T{});
#pragma unroll
      for (int e = 0; e < E; ++e) {
        const float x = a[e] - centre[0][e], y = b[e] - centre[1][e];
        rest[0][e] += x;
        rest[1][e] += y;
        m2[0][e] += x * x;
        m2[1][e] += y * y;
        cross[e] += x * y;
      }
    });
    store_sums(0, rest[0]);
    store_sums(1, rest[1]);
    store_sums(2, m2[0]);
    store_sums(3, m2[1]);
    store_sums(4, cross);
    barrier();
    for (int i = thread(); i < moment_count * columns; i += normalize_threads) {
      m.moments[i / columns][i % columns] = sum_over_warps(i / columns, i % columns);
    }
    barrier();
    if (thread() >= columns) return;
    const int f = thread();
    float sums[moment_count];
#pragma unroll
    for (int i = 0; i < moment_count; ++i) sums[i] = m.moments[i][f];
    const float mean_a = sums[0] * by_rows(), mean_b = sums[1] * by_rows();
    const bool centred = params.p.normalized;  // else only the products are wanted
    m.moments[0][f] = centred ? m.centre[0][f] - shift(0, f) + mean_a : 0.f;
    m.moments[1][f] = centred ? m.centre[1][f] - shift(1, f) + mean_b : 0.f;
    m.moments[2][f] = larger(0.f, sums[2] - sums[0] * mean_a);
    m.moments[3][f] = larger(0.f, sums[3] - sums[1] * mean_b);
    m.moments[4][f] = centred ? sums[4] - sums[0] * mean_b : sums[4];
  }

  // From all samples' moments of a feature to what standardises it, the stats and its parts of the sums, which only the
  // slab's first block (`stores`) writes.
  BARLOW_DEVICE void finish_feature(const Moments& m, int feature, bool stores, Standardising (&to)[2], double& on_sum,
                                    double& squares) const {
    const Normalize& p = params.p;
    const int64_t d = p.d, at = slab * columns + feature;
    const bool inside = at < d;
    float c = m.cross * params.by_n, rstd[2] = {1.f, 1.f}, kappa[2];
    if (p.normalized) {
#pragma unroll
      for (int view = 0; view < 2; ++view) {
        // normalization.py's table
        const float var = (view == 0 ? m.m2_a : m.m2_b) * params.by_m, n_by_m = p.n * params.by_m;
        if (p.eps_in_root) {
          rstd[view] = 1.f / sqrtf(var + p.eps);
          kappa[view] = n_by_m;
        } else {
          const float std = sqrtf(var);
          rstd[view] = 1.f / (std + p.eps);
          kappa[view] = std == 0.f ? 0.f : n_by_m * ((std + p.eps) * (1.f / std));
        }
        const float mean = view == 0 ? m.mean_a : m.mean_b, first = shift(view, feature);
        to[view].centre = first + mean;
        to[view].scale = rstd[view];
        to[view].offset = -(mean - (to[view].centre - first)) * rstd[view];
      }
      c *= rstd[0] * rstd[1];
    }
    if (!stores || !inside) return;
    float* const stat = p.stats + at;
    stat[stat_c * d] = c;
    if (p.normalized) {
#pragma unroll
      for (int view = 0; view < 2; ++view) {
        stat[(stat_mean + view) * d] = to[view].centre;
        stat[(stat_rstd + view) * d] = rstd[view];
        stat[(stat_kappa + view) * d] = kappa[view];
        stat[(stat_square + view) * d] = (view == 0 ? m.m2_a : m.m2_b) * rstd[view] * rstd[view] * params.by_n;
      }
    }
    on_sum += (static_cast<double>(c) - 1) * (static_cast<double>(c) - 1);
    squares += static_cast<double>(c) * c;
  }

  // The slab's entries of the sums, and its share of the zeros. All threads.
  BARLOW_DEVICE void finish_slab(double on_sum, double squares) const {
    const Normalize& p = params.p;
    double* const scratch = memory().scratch;
    on_sum = block_sum<Team>(on_sum, scratch);
    squares = block_sum<Team>(squares, scratch);
    if (thread() == 0) {
      p.sums[slab] = on_sum;
      p.sums[p.slabs + slab] = squares;
    }
    const int share = ceil_div(p.counter_count, p.slabs), first = slab * share;
    for (int i = thread(); i < share && first + i < p.counter_count; i += normalize_threads) p.counters[first + i] = 0;
  }

  // All moments of this slab, combined from its parts' (`moments_of(part, feature)`), and what follows for the block.
  template <class F>
  BARLOW_DEVICE void finish(int parts, F moments_of) const {
    Memory& m = memory();
    double on_sum = 0, squares = 0;
    if (thread() < columns) {
      const int feature = thread();
      Moments all = moments_of(0, feature);
      float rows = static_cast<float>(smaller(params.rows, params.p.n));
      for (int i = 1; i < parts; ++i) {
        const float here = static_cast<float>(smaller(params.rows, params.p.n - i * params.rows));
        all.add(moments_of(i, feature), rows, here, 1.f / (rows + here));
        rows += here;
      }
      Standardising to[2];
      finish_feature(all, feature, part == 0, to, on_sum, squares);
      if (params.p.normalized) {
#pragma unroll
        for (int view = 0; view < 2; ++view) {
          m.centre[view][feature] = to[view].centre;
          m.scale[view][feature] = to[view].scale;
          m.offset[view][feature] = to[view].offset;
        }
      }
    }
    if (part == 0) finish_slab(on_sum, squares);
    barrier();
  }

  BARLOW_DEVICE Moments own_moments(int feature) const {
    const Memory& m = memory();
    return {m.moments[0][feature], m.moments[1][feature], m.moments[2][feature], m.moments[3][feature],
            m.moments[4][feature]};
  }

  // A_hat and B_hat of this part.
  BARLOW_DEVICE void store_hats() const {
    if (!params.p.normalized) return;
    const Memory& m = memory();
#pragma unroll 1
    for (int view = 0; view < 2; ++view) {
      float centre[E], scale[E], offset[E];
      load_features(m.centre[view], centre);
      load_features(m.scale[view], scale);
      load_features(m.offset[view], offset);
      const Matrix& to = view == 0 ? params.p.a_hat : params.p.b_hat;
      for_rows(view, begin, end, [&](int row, float (&x)[E]) {
#pragma unroll
        for (int e = 0; e < E; ++e) x[e] = (x[e] - centre[e]) * scale[e] + offset[e];
        store_row_as<T>(to, params.hat_vectors, row, column, count, x);
      });
    }
  }
};

// How the features are cut: GROUPS times 16 bytes of a row to a block, `rows` rows a part, in `parts` blocks of a cluster
// or chunks through memory.
struct SlabLayout {
  int groups, rows, parts;
  bool cluster;
};

inline NormalizeParams normalize_params(const Normalize& p, const SlabLayout& layout) {
  const bool hat_vectors = p.normalized && p.a_hat.dtype == p.z_a.dtype && has_vectors(p.a_hat) && has_vectors(p.b_hat);
  const int last = p.n - (layout.parts - 1) * layout.rows;
  return {p,           has_vectors(p.z_a), has_vectors(p.z_b),         hat_vectors,
          layout.rows, 1.f / p.n,          1.f / (p.n - p.correction), {1.f / layout.rows, 1.f / last}};
}

}  // namespace barlow
