// correlate on Hopper: correlate.h with hopper_multiply.h's product, half precision.
//
// A cluster of two blocks computes 256 x 256 of C at a time, 128 rows each. Both factors lie with the features
// contiguous, across k: wgmma reads half precision so too. The epilogue works on the fragments where they are: a thread
// has two rows and 64 columns, adds up its squares both ways, and stores pairs of numbers of C0.
//
// N = 8192, D = 2048: 128 tiles of 128 x 256 and 128 steps of 1024 cycles, one wave on 132 multiprocessors.
#include <cmath>
#include <type_traits>

#include "blocks/grouped.h"
#include "blocks/hopper_epilogue.h"
#include "kernels/correlate.h"
#include "kernels/hopper_kernels.h"

namespace barlow {
namespace {

// C0 is stored as T, or as float.
template <class T, bool TO_FLOAT>
struct CorrelateJob {
  using Out = std::conditional_t<TO_FLOAT, float, T>;
  using Product = HopperMultiply<T, 256, 4, 2, false, false>;
  using Place = typename Product::Place;
  static constexpr int cluster = Product::CLUSTER;
  struct Params {
    TensorMap raw[2], hat[2];  // of each view
    Correlate p;
    int tiles_i, tiles_j;  // 128 x 256
    bool pairs;            // of C0 can be stored at once
    int works;
  };
  struct Memory {
    float mean[Product::N], rstd[Product::N];
    float sums[Consumers::threads / 32][Product::N];  // of squares: each warp's rows
    double scratch[Consumers::threads / 32];
  };
  static constexpr const char* name = "correlate";
  static constexpr int epilogue_bytes = sizeof(Memory);
  static constexpr int square = 2 * Product::M;
  static_assert(square == Product::N, "a cluster computes a square");

  const Params& params;
  Memory& memory;
  BARLOW_DEVICE explicit CorrelateJob(const Params& p)
      : params(p), memory(*reinterpret_cast<Memory*>(Product::epilogue_memory())) {}

  // First row and column of the cluster's square.
  BARLOW_DEVICE void place(int work, int& row, int& column) const {
    grouped_tile(work, params.tiles_j, params.tiles_j, row, column);
    row *= square;
    column *= square;
  }

  // Whether a square multiplies z itself, as multiplies_raw says. Every warp of the cluster finds out for itself, and
  // must find the same: a maximum does not depend on the order, and NaN counts as infinity.
  BARLOW_DEVICE bool is_raw(int row, int column) const {
    const Correlate& p = params.p;
    if (p.z_a.data == nullptr) return false;
    float largest[2] = {0.f, 0.f};
#pragma unroll
    for (int view = 0; view < 2; ++view) {
      const int first = view == 0 ? row : column;
      for (int i = first + lane(); i < smaller(first + square, p.d); i += 32) {
        const float ratio = fabsf(p.stats[(stat_mean + view) * static_cast<int64_t>(p.d) + i] *
                                  p.stats[(stat_rstd + view) * static_cast<int64_t>(p.d) + i]);
        if (!(ratio <= largest[view])) largest[view] = ratio == ratio ? ratio : HUGE_VALF;
      }
#pragma unroll
      for (int mask = 16; mask >= 1; mask /= 2) {
        largest[view] = larger(largest[view], shuffle_xor(largest[view], mask));
      }
    }
    return largest[0] * largest[1] <= p.raw_limit;
  }

  BARLOW_DEVICE int steps() const { return ceil_div(params.p.n, Product::K); }

  BARLOW_DEVICE void produce(Place& ring, int work) const {
    int row, column;
    place(work, row, column);
    const TensorMap* const x = is_raw(row, column) ? params.raw : params.hat;
    if (lane() == 0) Product::load(ring, {x, x + 1, row + cluster_rank() * Product::M, column, 0, steps()});
  }

  BARLOW_DEVICE void consume(Place& ring, int work) const {
    const Correlate& p = params.p;
    int row, column;
    place(work, row, column);
    const bool raw = is_raw(row, column);
    row += cluster_rank() * Product::M;
    {  // the last tile's have been read: finish meets after that
      const int j = column + thread();
      const float* const stat = p.stats + j;
      memory.mean[thread()] = raw && j < p.d ? stat[(stat_mean + 1) * static_cast<int64_t>(p.d)] : 0.f;
      memory.rstd[thread()] = raw && j < p.d ? stat[(stat_rstd + 1) * static_cast<int64_t>(p.d)] : 1.f;
    }
    Consumers::barrier();
    typename Product::Accumulator acc;
    Product::multiply(ring, acc, steps());
    if (row < p.d) finish(acc, row, column, raw);
  }

  BARLOW_DEVICE void finish(const typename Product::Accumulator& acc, int first_row, int first_column, bool raw) const {
    const Correlate& p = params.p;
    const int tile_i = first_row / Product::M, tile_j = first_column / Product::N;
    const int row = first_row + Product::row_of(0);  // and 8 more
    const float by_n = 1.f / p.n;
    float mean[2] = {0.f, 0.f}, rstd[2] = {1.f, 1.f}, over_columns[2] = {0.f, 0.f};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = row + 8 * h;
      if (raw && i < p.d) {
        mean[h] = p.stats[stat_mean * static_cast<int64_t>(p.d) + i];
        rstd[h] = p.stats[stat_rstd * static_cast<int64_t>(p.d) + i];
      }
    }
#pragma unroll
    for (int part = 0; part < Product::N / box_columns; ++part) {
      float over_rows[2 * box_fragments];
#pragma unroll
      for (int f = 0; f < box_fragments; ++f) {
        const int at = Product::column_of(part * box_fragments + f), j = first_column + at;
        over_rows[2 * f] = over_rows[2 * f + 1] = 0.f;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int i = row + 8 * h;
          float c[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            c[e] = acc[0][part * box_fragments + f][2 * h + e] * by_n;
            c[e] = (c[e] - mean[h] * memory.mean[at + e]) * (rstd[h] * memory.rstd[at + e]);
            if (i == j + e) c[e] = 0.f;  // beyond the edges it is 0 already: as the product is, and the means
            over_columns[h] += c[e] * c[e];
            over_rows[2 * f + e] += c[e] * c[e];
          }
          if (p.c.data != nullptr && i < p.d) store_c(i, j, c);
        }
      }
      sum_columns(over_rows);
      memory.sums[warp()][part * box_columns + 2 * lane()] = over_rows[0];
      memory.sums[warp()][part * box_columns + 2 * lane() + 1] = over_rows[1];
    }
    const double total = static_cast<double>(over_columns[0]) + static_cast<double>(over_columns[1]);
    if (p.row_sums != nullptr) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        over_columns[h] += shuffle_xor(over_columns[h], 1);
        over_columns[h] += shuffle_xor(over_columns[h], 2);
        const int i = row + 8 * h;
        if (lane() % 4 == 0 && i < p.d) p.row_sums[static_cast<int64_t>(tile_j) * p.d + i] = over_columns[h];
      }
      Consumers::barrier();
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < Consumers::threads / 32; ++w) sum += memory.sums[w][thread()];
      const int j = first_column + thread();
      if (j < p.d) p.row_sums[static_cast<int64_t>(params.tiles_j + tile_i) * p.d + j] = sum;
    }
    complete_correlate<Consumers, Product::M, Product::N>(p, params.tiles_i, params.tiles_j, tile_i, tile_j, total,
                                                          memory.scratch);
  }

  BARLOW_DEVICE void store_c(int i, int j, const float (&c)[2]) const {
    const Matrix& m = params.p.c;
    Out* const to = static_cast<Out*>(m.data) + i * m.row_stride + j;
    if (j + 1 < params.p.d && (sizeof(Out) == 4 || params.pairs)) {
      store_two(to, c);
    } else if (j < params.p.d) {
      to[0] = from_float<Out>(c[0]);
      if (j + 1 < params.p.d) to[1] = from_float<Out>(c[1]);
    }
  }
};

template <class T, bool TO_FLOAT>
void launch_correlate(const Correlate& p, Stream stream) {
  using Job = CorrelateJob<T, TO_FLOAT>;
  using Kernel = HopperKernel<Job>;
  const auto what = [&p] { return launch_name(Kernel::name, p.n, p.d); };
  typename Kernel::Params params{};
  params.p = p;
  params.tiles_i = ceil_div(p.d, Job::Product::M);
  params.tiles_j = ceil_div(p.d, Job::Product::N);
  params.pairs = p.c.row_stride % 2 == 0 && reinterpret_cast<uintptr_t>(p.c.data) % 4 == 0;
  params.hat[0] = Job::Product::a_map(p.a_hat, p.n, p.d, what);
  params.hat[1] = Job::Product::b_map(p.b_hat, p.n, p.d, what);
  if (p.z_a.data != nullptr) {
    params.raw[0] = Job::Product::a_map(p.z_a, p.n, p.d, what);
    params.raw[1] = Job::Product::b_map(p.z_b, p.n, p.d, what);
  }
  params.works = params.tiles_j * params.tiles_j;
  launch_clusters<Kernel>(params.works, stream, params, p.n, p.d);
}

template <class T>
void choose_correlate(const Correlate& p, Stream stream) {
  if (p.c.data != nullptr && p.c.dtype == DType::float32) return launch_correlate<T, true>(p, stream);
  launch_correlate<T, false>(p, stream);
}

}  // namespace

bool hopper_can_correlate(const Correlate& p, int device) {
  const auto is_map = [&p](const Matrix& m) { return has_tensor_map(m) && m.dtype == p.a_hat.dtype; };
  return is_hopper(device) && clusters_at_once<HopperKernel<CorrelateJob<bfloat16, false>>>(device) > 0 &&
         p.block == 128 && is_map(p.a_hat) && is_map(p.b_hat) &&
         (p.z_a.data == nullptr || (is_map(p.z_a) && is_map(p.z_b)));
}

void hopper_correlate(const Correlate& p, Stream stream) {
  const DeviceGuard guard(stream.device);  // before the tensor maps, which need its context
  p.a_hat.dtype == DType::bfloat16 ? choose_correlate<bfloat16>(p, stream) : choose_correlate<float16>(p, stream);
}

}  // namespace barlow
