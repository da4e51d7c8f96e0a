// partial_gram on Hopper: partial_gram.cu's panels with hopper_multiply.h's product, half precision.
//
// A cluster of two blocks computes 256 x 256 of K at a time, on or below the diagonal, of a slice of D, each block 128
// rows of it. Beyond 8192 products, where the tensor cores' sums have drifted enough, it adds to what it has stored.
#include "blocks/hopper_multiply.h"
#include "kernels/gram.h"
#include "kernels/hopper_kernels.h"

namespace barlow {
namespace {

template <class T>
struct PartialGramJob {
  using Product = HopperMultiply<T, 256, 4, 2, true, true>;
  using Place = typename Product::Place;
  static constexpr int cluster = Product::CLUSTER;
  struct Params {
    TensorMap a, b;
    PartialGram p;
    int squares;  // of the lower triangle
    int works;
  };
  static constexpr const char* name = "partial_gram";
  static constexpr int epilogue_bytes = 0;
  static constexpr int most_steps = 128;

  const Params& params;
  BARLOW_DEVICE explicit PartialGramJob(const Params& p) : params(p) {}

  BARLOW_DEVICE void place(int work, int& row, int& column) const {
    lower_triangle_tile(work % params.squares, row, column);
    row = (row * cluster + cluster_rank()) * Product::M;
    column *= Product::N;
  }
  BARLOW_DEVICE int first_of(int work) const { return work / params.squares * params.p.steps; }
  BARLOW_DEVICE int steps_of(int work) const {
    return smaller(params.p.steps, ceil_div(params.p.d, Product::K) - first_of(work));
  }

  BARLOW_DEVICE void produce(Place& ring, int work) const {
    int row, column;
    place(work, row, column);
    if (lane() != 0) return;
    Product::load(ring, {&params.a, &params.b, row, column, first_of(work) * Product::K, steps_of(work)});
  }

  BARLOW_DEVICE void consume(Place& ring, int work) const {
    int row, column;
    place(work, row, column);
    const int steps = steps_of(work);
    for (int done = 0; done < steps; done += most_steps) {
      typename Product::Accumulator acc;
      Product::multiply(ring, acc, smaller(most_steps, steps - done));
      store(acc, work / params.squares, row, column, done > 0);
    }
  }

  BARLOW_DEVICE void store(const typename Product::Accumulator& acc, int part, int row, int column, bool add) const {
    const PartialGram& p = params.p;
    const int64_t panel = row / p.panel;                                   // its rows begin here, times p.panel
    const int stop = smaller(static_cast<int>(panel + 1) * p.panel, p.n);  // and end here, as its columns do
    const int m = row + Product::row_of(0), first = static_cast<int>(panel) * p.panel;
    // The panels before it, each of whole rows, and the rows before this thread's
    float* const out = p.partials + part * p.size + panel * (panel + 1) / 2 * p.panel * p.panel +
                       static_cast<int64_t>(m - first) * stop + column;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (m + 8 * h >= stop) continue;
#pragma unroll
      for (int j = 0; j < Product::COLUMNS; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int at = Product::column_of(j) + e;
          if (column + at >= stop) continue;
          float* const to = out + int64_t{8} * h * stop + at;
          *to = add ? *to + acc[0][j][2 * h + e] : acc[0][j][2 * h + e];
        }
      }
    }
  }
};

template <class T>
void launch_partial_gram(const PartialGram& p, Stream stream) {
  using Job = PartialGramJob<T>;
  const auto what = [&p] { return launch_name(Job::name, p.n, p.d); };
  typename Job::Params params{};
  params.p = p;
  params.a = Job::Product::a_map(p.x, p.n, p.d, what);
  params.b = Job::Product::b_map(p.x, p.n, p.d, what);
  const int rows = ceil_div(p.n, Job::Product::N);
  params.squares = rows * (rows + 1) / 2;
  params.works = params.squares * p.split;
  launch_clusters<HopperKernel<Job>>(params.works, stream, params, p.n, p.d);
}

}  // namespace

int hopper_partial_gram_clusters(int n, int device) {
  if (!is_hopper(device) || n <= 128) return 0;  // a tile's lower half would be empty
  return clusters_at_once<HopperKernel<PartialGramJob<bfloat16>>>(device);
}

bool hopper_can_partial_gram(const PartialGram& p, int device) {
  return p.panel % 128 == 0 && has_tensor_map(p.x) && hopper_partial_gram_clusters(p.n, device) > 0;
}

void hopper_partial_gram(const PartialGram& p, Stream stream) {
  const DeviceGuard guard(stream.device);  // before the tensor maps, which need its context
  p.x.dtype == DType::bfloat16 ? launch_partial_gram<bfloat16>(p, stream) : launch_partial_gram<float16>(p, stream);
}

}  // namespace barlow
