// gram on Hopper: gram.h with hopper_multiply.h's product, half precision.
//
// The tiles that are stored, counted and finished are gram.cu's, 128 x 128. Beyond 512 rows a cluster of two blocks
// computes 256 x 256 of K at a time, each block 128 rows of it, and finishes those of its two tiles that are not above
// the diagonal. Up to 512 rows a block computes one tile: the slices of D, not the tiles, fill the chip there.
//
// N = 2048, D = 8192, both views: 2 * 36 squares of 256 x 256 and 128 steps of 64 k, 1.125 times what the triangle needs;
// 66 clusters take at least 140 steps of 1024 cycles each.
#include "gram.h"
#include "hopper_kernels.h"
#include "hopper_multiply.h"

namespace barlow {
namespace {

template <class Product_>
struct GramJob {
  using Product = Product_;
  using Tile = ColumnsOf<Product, 128>;
  static constexpr int CLUSTER = Product::CLUSTER;
  struct Params {
    TensorMap a[2], b[2];  // of each view
    Gram p;
    int squares, tiles;  // of the lower triangle: what a cluster computes, and 128 x 128
    int works;
  };
  static constexpr const char* name = "gram";
  static constexpr int epilogue_bytes = 512;
  static_assert(Product::N == CLUSTER * 128, "a cluster computes a square");

  const Params& params;
  BARLOW_DEVICE explicit GramJob(const Params& p) : params(p) {}

  // Squares run fastest: clusters that run together read the same columns of A_hat.
  BARLOW_DEVICE void place(int work, int& row, int& column, int& view, int& slice) const {
    lower_triangle_tile(work % params.squares, row, column);
    view = work / params.squares % 2;
    slice = work / (2 * params.squares);
    row = row * CLUSTER + cluster_rank();
    column *= CLUSTER;
  }

  BARLOW_DEVICE int steps(int slice) const {
    return smaller(params.p.steps, ceil_div(params.p.d, Product::K) - slice * params.p.steps);
  }

  BARLOW_DEVICE void produce(typename Product::Place& ring, int work) const {
    int row, column, view, slice;
    place(work, row, column, view, slice);
    if (lane() == 0) {
      Product::load(ring, {&params.a[view], &params.b[view], row * 128, column * 128,
                           slice * params.p.steps * Product::K, steps(slice)});
    }
  }

  BARLOW_DEVICE void consume(typename Product::Place& ring, int work) const {
    int row, column, view, slice;
    place(work, row, column, view, slice);
    typename Product::Accumulator acc;
    Product::multiply(ring, acc, steps(slice));
#pragma unroll
    for (int half = 0; half < CLUSTER; ++half) {
      if (column + half <= row && row * 128 < params.p.n) {
        const int tile = row * (row + 1) / 2 + column + half;
        finish_gram<Tile>(params.p, params.tiles, tile, view, slice, row * 128, (column + half) * 128,
                          Tile::of(acc, half), Product::epilogue_memory());
      }
    }
  }
};

template <class T, int CLUSTER, int STAGES>
void launch_gram(const Gram& p, Stream stream) {
  using Product = HopperMultiply<T, 128 * CLUSTER, STAGES, CLUSTER, true, true>;
  using Kernel = HopperKernel<GramJob<Product>>;
  const auto what = [&p] { return launch_name(Kernel::name, p.n, p.d); };
  typename Kernel::Params params{};
  params.p = p;
  const Matrix x[2] = {p.a_hat, p.b_hat};
  for (int view = 0; view < 2; ++view) {
    params.a[view] = Product::a_map(x[view], p.n, p.d, what);
    params.b[view] = Product::b_map(x[view], p.n, p.d, what);
  }
  const int rows = ceil_div(p.n, 128), square_rows = ceil_div(rows, CLUSTER);
  params.tiles = rows * (rows + 1) / 2;
  params.squares = square_rows * (square_rows + 1) / 2;
  params.works = 2 * params.squares * p.split;
  launch_clusters<Kernel>(params.works, Kernel::shared_bytes, stream, params, p.n, p.d);
}

template <class T>
void choose_gram(const Gram& p, Stream stream) {
  p.n > hopper_gram_many_rows ? launch_gram<T, 2, 4>(p, stream) : launch_gram<T, 1, 6>(p, stream);
}

}  // namespace

bool hopper_can_gram(const Gram& p, int device) {
  return is_hopper(device) && p.block == 128 && has_tensor_map(p.a_hat) && has_tensor_map(p.b_hat);
}

void hopper_gram(const Gram& p, Stream stream) {
  p.a_hat.dtype == DType::bfloat16 ? choose_gram<bfloat16>(p, stream) : choose_gram<float16>(p, stream);
}

}  // namespace barlow
