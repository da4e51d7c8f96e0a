// correlate on any GPU from sm_80: correlate.h with multiply.h's product.
#include "blocks/grouped.h"
#include "kernels/correlate.h"
#include "kernels/hopper_kernels.h"

namespace barlow {
namespace {

template <class Product>
struct CorrelateKernel {
  using Team = typename Product::Team;
  using Rows = Tile<typename Product::T, Product::M, Product::N, Product::threads>;
  struct Params {
    Correlate p;
    Operand raw[2], hat[2];
    int tiles;
  };
  static constexpr const char* name = "correlate";
  static constexpr int threads = Product::threads;
  static constexpr int blocks_per_sm = 1;
  // The scratch lies behind the finished tile, where the product's stages were: 96 KiB for 128 x 128, of 99.
  static constexpr int shared_bytes = larger(Product::shared_bytes, Rows::bytes + threads / 32 * Product::N * 4);

  static BARLOW_DEVICE void run(const Params& params) {
    const Correlate& p = params.p;
    int tile_i, tile_j;
    grouped_tile(block_id(), params.tiles, params.tiles, tile_i, tile_j);
    char* const scratch = shared_memory() + Rows::bytes;
    const int row = tile_i * Product::M, column = tile_j * Product::N;
    const bool raw = multiplies_raw<Team, Product::M, Product::N>(p, row, column, reinterpret_cast<float*>(scratch));
    typename Product::Accumulator acc;
    Product::run(acc, raw ? params.raw[0] : params.hat[0], raw ? params.raw[1] : params.hat[1], row, column, 0, p.n, 1);
    float* const tile = reinterpret_cast<float*>(shared_memory());
    write_tile<Product, Rows::pitch>(acc, tile);
    barrier();
    finish_correlate<Product>(p, params.tiles, tile_i, tile_j, raw, tile, scratch);
  }
};

// Both factors lie with the features contiguous, across k.
template <class T, int BLOCK, bool SPLIT>
using CorrelateProduct = Multiply<T, BLOCK, BLOCK, 2, BLOCK / 32, 3, false, false, SPLIT, SPLIT>;

template <class Product>
void launch_correlate(const Correlate& p, Stream stream) {
  using Kernel = CorrelateKernel<Product>;
  typename Kernel::Params params{};
  params.p = p;
  params.tiles = ceil_div(p.d, Product::M);
  const auto operand = [&p](const Matrix& x) {
    return Operand{x.data, x.column_stride, x.row_stride, p.d, has_vectors(x)};
  };
  params.raw[0] = operand(p.z_a);
  params.raw[1] = operand(p.z_b);
  params.hat[0] = operand(p.a_hat);
  params.hat[1] = operand(p.b_hat);
  launch<Kernel>(static_cast<int64_t>(params.tiles) * params.tiles, Kernel::shared_bytes, stream, params, p.n, p.d);
}

template <class T, bool SPLIT>
void choose_correlate(const Correlate& p, Stream stream) {
  if constexpr (!SPLIT) {
    if (p.block == 128) return launch_correlate<CorrelateProduct<T, 128, false>>(p, stream);
  }
  launch_correlate<CorrelateProduct<T, 64, SPLIT>>(p, stream);
}

}  // namespace

CorrelatePlan plan_correlate(int n, int d, DType dtype, Precision precision, int device) {
  (void)n;
  // The larger tiles where they fill the chip; three products of split numbers leave no registers for them.
  const int64_t large = ceil_div(d, 128);
  const bool few = large * large < device_info(device).multiprocessors;
  const bool split_products = dtype == DType::float32 && precision == Precision::float32;
  const int block = few || split_products ? 64 : 128;
  return {block, ceil_div(d, block)};
}

void correlate(const Correlate& p, Stream stream) {
  check_aligned(p.c.data, "c", "correlate", p.n, p.d);
  if (hopper_can_correlate(p, stream.device)) return hopper_correlate(p, stream);
  switch (p.a_hat.dtype) {
    case DType::bfloat16:
      return choose_correlate<bfloat16, false>(p, stream);
    case DType::float16:
      return choose_correlate<float16, false>(p, stream);
    case DType::float32:
      return p.precision == Precision::float32 ? choose_correlate<float, true>(p, stream)
                                               : choose_correlate<float, false>(p, stream);
  }
}

}  // namespace barlow
