// gram on any GPU from sm_80: gram.h with multiply.h's product.
#include "kernels/gram.h"
#include "kernels/hopper_kernels.h"

namespace barlow {
namespace {

// Tiles by what is multiplied, for few and for many rows. The last two: split products, long sums.
template <class T>
struct Tiles {
  using Few = Multiply<T, 64, 64, 2, 2, 4, true, true, false, true>;
  using Many = Multiply<T, 128, 128, 2, 4, 3, true, true, false, true>;
};
struct SplitTiles {
  using Few = Multiply<float, 64, 64, 2, 2, 3, true, true, true, true>;
  using Many = Few;
};
constexpr int many_rows = 512;          // from here on the larger tiles: 10 of them and more
constexpr int max_split = 32;           // the last block of a tile reads as many partial tiles one after another
constexpr int promote_products = 8192;  // tensor cores add up before a rounded addition; float32: every stage

template <class Product>
void launch_gram(const Gram& p, Stream stream) {
  using Kernel = GramKernel<Product>;
  typename Kernel::Params params{p, {}, 0, Product::SPLIT ? 1 : promote_products / Product::K};
  const int rows = ceil_div(p.n, p.block);
  params.tiles = rows * (rows + 1) / 2;
  const Matrix x[2] = {p.a_hat, p.b_hat};
  for (int view = 0; view < 2; ++view) {
    params.x[view] = {x[view].data, x[view].row_stride, x[view].column_stride, p.n, has_vectors(x[view])};
  }
  launch<Kernel>(2LL * params.tiles * p.split, Kernel::shared_bytes, stream, params, p.n, p.d);
}

template <class Choice>
void choose_gram(const Gram& p, Stream stream) {
  if (p.block == Choice::Many::M) {
    launch_gram<typename Choice::Many>(p, stream);
  } else {
    launch_gram<typename Choice::Few>(p, stream);
  }
}

}  // namespace

GramPlan plan_gram(int n, int d, DType dtype, Precision precision, int device) {
  const bool split_products = dtype == DType::float32 && precision == Precision::float32;
  const int clusters = dtype != DType::float32 ? hopper_gram_clusters(n, d, device) : 0;
  const bool hopper = clusters > 0;
  GramPlan plan{};
  plan.block = n >= (hopper ? hopper_gram_narrow_rows + 1 : many_rows) && !split_products ? 128 : 64;
  const int rows = ceil_div(n, plan.block);
  plan.tiles = rows * (rows + 1) / 2;
  const int size = dtype == DType::float32 ? 4 : 2;
  const int steps = ceil_div(d, 128 / size);
  // The partial tiles may take the memory of the two input gradients, which do not exist yet, and always one slice's.
  const int64_t slice = 2LL * plan.tiles * (hopper ? 128 : plan.block) * plan.block;
  int64_t budget = 2LL * n * d * size / (4 * slice);
  const bool squares = hopper && n > hopper_gram_many_rows;
  const GramPlan of_squares = squares ? hopper_plan_squares(n, d, clusters) : GramPlan{};
  // The slices below are then for inputs that the TMA cannot copy, and take no more room.
  if (squares) budget = of_squares.partials / slice;
  const int most = static_cast<int>(larger<int64_t>(1, smaller<int64_t>(smaller(max_split, steps), budget)));
  // A block takes as many steps as its slice has and about 8 more to start, store and hand over; a tile's last phase,
  // bound by what one multiprocessor gets from L2, about two a slice. The multiprocessors take the blocks in waves.
  int64_t workers = device_info(device).multiprocessors;
  int least = 1, blocks = 1;  // blocks that share a slice
  const int64_t works = 2LL * plan.tiles;
  if (hopper && !squares) {
    blocks = hopper_gram_pieces;
    plan.tiles *= blocks;
    workers = clusters;
    least = smaller(ceil_div(steps, blocks * promote_products / 64), max_split);  // no second accumulator: short sums
  }
  int64_t best = INT64_MAX;
  for (int split = least; split <= larger(least, most); ++split) {
    const int64_t waves = ceil_div(works * split, workers);
    const int64_t time = blocks * waves * (ceil_div(ceil_div(steps, split), blocks) + 8) + 2 * split;
    if (time < best) {
      best = time;
      plan.steps = ceil_div(steps, split);
      plan.split = ceil_div(steps, plan.steps);
      plan.longest = static_cast<int>(waves) * ceil_div(plan.steps, blocks);
    }
  }
  if (squares) plan.longest = of_squares.steps;
  plan.partials = larger(plan.split * slice, of_squares.partials);
  plan.tiles = larger(plan.tiles, of_squares.tiles);
  return plan;
}

void gram(const Gram& p, Stream stream) {
  check_aligned(p.partials, "partials", "gram", p.n, p.d);
  if (hopper_can_gram(p, stream.device)) return hopper_gram(p, stream);
  switch (p.a_hat.dtype) {
    case DType::bfloat16:
      return choose_gram<Tiles<bfloat16>>(p, stream);
    case DType::float16:
      return choose_gram<Tiles<float16>>(p, stream);
    case DType::float32:
      return p.precision == Precision::float32 ? choose_gram<SplitTiles>(p, stream)
                                               : choose_gram<Tiles<float>>(p, stream);
  }
}

}  // namespace barlow
