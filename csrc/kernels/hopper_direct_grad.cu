// direct_grad on Hopper: direct_grad.h with hopper_multiply.h's product and hopper_epilogue.h, half precision.
//
// A cluster of two blocks computes 256 x 256 of P at a time, 128 rows each. The consumers multiply and hand P over. The
// finishers work out four weights of each feature, grad = p P + (y Y + (x X + offset)), with X and Y as they lie in
// memory, and make the gradient while the consumers are at the next tile.
//
// N = 8192, D = 2048: 512 tiles of 128 x 256 and 32 steps of 1024 cycles for 132 multiprocessors, four waves; finishing
// a tile reads 128 KiB and writes 64 KiB.
#include "blocks/grouped.h"
#include "blocks/hopper_epilogue.h"
#include "kernels/direct_grad.h"
#include "kernels/hopper_kernels.h"

namespace barlow {
namespace {

template <class T, int VIEW>
struct DirectGradJob {
  // P[n, i] = sum_j B_hat[n, j] C0[i, j] of view a reads C0 along k, P[n, j] = sum_i A_hat[n, i] C0[i, j] of view b
  // across.
  using Product = HopperMultiply<T, 256, 3, 2, true, VIEW == 0>;
  using Tile = HandOver<Product>;
  using Place = typename Product::Place;
  static constexpr int cluster = Product::CLUSTER;
  struct Params {
    TensorMap a, b;
    InputGrad p;
    EpilogueMatrices m;
    int works;
  };
  struct Memory {
    typename Tile::Memory tile;
  };
  static constexpr const char* name = "direct_grad";
  static constexpr int epilogue_bytes = sizeof(Memory);

  const Params& params;
  Tile tile;
  BARLOW_DEVICE explicit DirectGradJob(const Params& p)
      : params(p), tile(reinterpret_cast<Memory*>(Product::epilogue_memory())->tile) {
    if (thread() == Consumers::threads) {
      prefetch_map(p.a);
      prefetch_map(p.b);
    }
  }

  BARLOW_DEVICE void place(int work, int& row, int& column) const {
    const int rows = ceil_div(params.p.n, 2 * Product::M), columns = ceil_div(params.p.d, Product::N);
    grouped_tile(work, rows, columns, row, column);
    row = (2 * row + cluster_rank()) * Product::M;
    column *= Product::N;
  }

  BARLOW_DEVICE void produce(Place& ring, int work) const {
    if (lane() != 0) return;
    int row, column;
    place(work, row, column);
    Product::load(ring, {&params.a, &params.b, row, column, 0, ceil_div(params.p.d, Product::K)});
  }

  BARLOW_DEVICE void consume(Place& ring, int) {
    typename Product::Accumulator acc;
    Product::multiply(ring, acc, ceil_div(params.p.d, Product::K));
    tile.wait_for_room();
#pragma unroll
    for (int box = 0; box < Tile::boxes; ++box) tile.put(acc, box);
    tile.give();
  }

  BARLOW_DEVICE void finish(int work, bool last) {
    walk(work, finishers_share(last), [this] { tile.wait_for_tile(); });
    tile.take();
  }
  BARLOW_DEVICE void help(int work) {
    walk(work, helpers_share(), [this] { tile.wait_for_last_tile(); });
  }

  template <class Wait>
  BARLOW_DEVICE void walk(int work, RowShare share, Wait wait) const {
    const InputGrad& p = params.p;
    int row, column;
    place(work, row, column);
    float of_p[8], of_y[8], of_x[8], offset[8];
    {
      Combination<8> w;
      direct_weights(p, VIEW, column + lane() * 8, w);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        of_p[e] = w.weight_p[e] * (1.f / Tile::scale);
        of_y[e] = w.weight_y[e];
        of_x[e] = w.weight_x[e] * w.scale_x[e];
        offset[e] = w.weight_x[e] * w.offset_x[e] + w.offset_y[e];
      }
    }
    FinishedRows<T, 6> rows(params.m.own, params.m.other, params.m.grad, p, share, row, column);
    wait();
    rows.each([&](int r, const float (&own)[8], const float (&other)[8], float (&g)[8]) {
      tile.get(r, g);
#pragma unroll
      for (int e = 0; e < 8; ++e) g[e] = of_p[e] * g[e] + (of_y[e] * other[e] + (of_x[e] * own[e] + offset[e]));
    });
  }
};

template <class T, int VIEW>
void launch_direct_grad(const InputGrad& p, Stream stream) {
  using Job = DirectGradJob<T, VIEW>;
  using Kernel = HopperKernel<Job, true>;
  const auto what = [&p] { return launch_name(Kernel::name, p.n, p.d); };
  typename Kernel::Params params{};
  params.p = p;
  params.a = Job::Product::a_map(p.hat[1 - VIEW], p.n, p.d, what);
  params.b = Job::Product::b_map(p.product, p.d, p.d, what);
  params.m = epilogue_matrices(p, VIEW);
  params.works = ceil_div(p.n, 256) * ceil_div(p.d, 256);
  launch_clusters<Kernel>(params.works, stream, params, p.n, p.d);
}

template <class T>
void both_views(const InputGrad& p, Stream stream) {
  if (p.grad[0].data != nullptr) launch_direct_grad<T, 0>(p, stream);
  if (p.grad[1].data != nullptr) launch_direct_grad<T, 1>(p, stream);
}

}  // namespace

bool hopper_can_direct_grad(const InputGrad& p, int device) {
  return is_hopper(device) && clusters_at_once<HopperKernel<DirectGradJob<bfloat16, 0>, true>>(device) > 0 &&
         hopper_fills(device, 2, ceil_div(p.n, 256) * ceil_div(p.d, 256)) && has_tensor_map(p.hat[0]) &&
         has_tensor_map(p.hat[1]) && has_tensor_map(p.product) && hopper_can_finish(p);
}

void hopper_direct_grad(const InputGrad& p, Stream stream) {
  const DeviceGuard guard(stream.device);  // before the tensor maps, which need its context
  p.hat[0].dtype == DType::bfloat16 ? both_views<bfloat16>(p, stream) : both_views<float16>(p, stream);
}

}  // namespace barlow
