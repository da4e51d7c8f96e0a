// partial_gram: one view's K = X_hat X_hat^T, summed over the features that a process has. One launch.
//
//     reads   X_hat [N, D]
//     writes  [split, size] float32: each slice's sums, in panels of K's lower triangle, ready to be sent
//     FLOPs   N^2 D and a little more: panels are whole to their right end
//     bytes   N D, about N / BLOCK times through L2; 2 split N^2 written
//
// gram cannot be used: it wants both views at once, where one should be multiplied while the other travels, and it
// divides, shifts and rounds K, which must first be summed over the processes. What is left is the product.
#include "blocks/multiply.h"
#include "kernels/hopper_kernels.h"

namespace barlow {
namespace {

template <class Product>
struct PartialGramKernel {
  struct Params {
    PartialGram p;
    Operand x;
    int promote_every;
  };
  static constexpr const char* name = "partial_gram";
  static constexpr int threads = Product::threads;
  static constexpr int blocks_per_sm = 1;
  static constexpr int shared_bytes = Product::shared_bytes;

  static BARLOW_DEVICE void run(const Params& params) {
    const PartialGram& p = params.p;
    const int tiles = ceil_div(p.n, Product::M);
    const int column = block_id() % tiles * Product::N, row = block_id() / tiles % tiles * Product::M;
    const int part = block_id() / tiles / tiles;
    const int panel = row / p.panel;                       // its rows begin here, times p.panel
    const int stop = smaller((panel + 1) * p.panel, p.n);  // and end here, as its columns do
    if (column >= stop) return;
    const int slice = p.steps * Product::K;
    typename Product::Accumulator acc;
    Product::run(acc, params.x, params.x, row, column, part * slice, smaller((part + 1) * slice, p.d),
                 params.promote_every);
    const int64_t above =
        static_cast<int64_t>(panel) * (panel + 1) / 2 * p.panel * p.panel;  // elements before the panel
    float* const out = p.partials + part * p.size + above;
#pragma unroll
    for (int i = 0; i < Product::ROWS; ++i) {
#pragma unroll
      for (int j = 0; j < Product::COLUMNS; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int m = row + Product::row_of(i) + e / 2 * 8, n = column + Product::column_of(j) + e % 2;
          if (m < stop && n < stop) out[static_cast<int64_t>(m - panel * p.panel) * stop + n] = acc[i][j][e];
        }
      }
    }
  }
};

// One size of tiles for what is multiplied: large ones where registers allow.
template <class T>
using HalfProduct = Multiply<T, 128, 128, 2, 4, 3, true, true, false, true>;
template <bool SPLIT>
using FloatProduct = Multiply<float, 64, 64, 2, 2, 3, true, true, SPLIT, true>;
constexpr int max_split = 8;            // each slice's sums are read once more to be added
constexpr int promote_products = 8192;  // tensor cores add up before a rounded addition; float32: every stage

template <class Product>
void launch_partial_gram(const PartialGram& p, Stream stream) {
  using Kernel = PartialGramKernel<Product>;
  if (p.block != Product::M || p.panel % p.block != 0) {
    throw std::runtime_error(launch_name(Kernel::name, p.n, p.d) + ": panels of " + std::to_string(p.panel) +
                             " rows are not whole tiles of " + std::to_string(Product::M));
  }
  const Operand x = {p.x.data, p.x.row_stride, p.x.column_stride, p.n, has_vectors(p.x)};
  const int promote_every = Product::SPLIT ? 1 : promote_products / Product::K;
  const int64_t tiles = ceil_div(p.n, p.block);
  launch<Kernel>(tiles * tiles * p.split, Kernel::shared_bytes, stream, {p, x, promote_every}, p.n, p.d);
}

}  // namespace

GramPlan plan_partial_gram(int n, int d, DType dtype, int device) {
  GramPlan plan{};
  plan.block = dtype == DType::float32 ? 64 : 128;
  const int rows = ceil_div(n, plan.block), steps = ceil_div(d, dtype == DType::float32 ? 32 : 64);
  plan.tiles = rows * (rows + 1) / 2;
  // Slices fill the chip where tiles do not.
  const int clusters = dtype == DType::float32 ? 0 : hopper_partial_gram_clusters(n, device);
  const int squares = ceil_div(n, 256) * (ceil_div(n, 256) + 1) / 2;  // a cluster's tiles on Hopper
  const int workers = clusters > 0 ? clusters : device_info(device).multiprocessors;
  const int wanted = smaller(smaller(max_split, steps), ceil_div(workers, clusters > 0 ? squares : plan.tiles));
  plan.steps = ceil_div(steps, wanted);
  plan.split = ceil_div(steps, plan.steps);
  return plan;
}

void partial_gram(const PartialGram& p, Stream stream) {
  if (hopper_can_partial_gram(p, stream.device)) return hopper_partial_gram(p, stream);
  switch (p.x.dtype) {
    case DType::bfloat16:
      return launch_partial_gram<HalfProduct<bfloat16>>(p, stream);
    case DType::float16:
      return launch_partial_gram<HalfProduct<float16>>(p, stream);
    case DType::float32:
      return p.precision == Precision::float32 ? launch_partial_gram<FloatProduct<true>>(p, stream)
                                               : launch_partial_gram<FloatProduct<false>>(p, stream);
  }
}

}  // namespace barlow
