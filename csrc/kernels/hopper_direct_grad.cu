// direct_grad on Hopper: direct_grad.h with hopper_multiply.h's product and hopper_epilogue.h, half precision.
//
// A cluster of two blocks computes 256 x 256 of P at a time, 128 rows each. Of each feature four numbers are worked out
// once for a tile, grad = weight_p P + weight_y y + weight_x x + offset, with x and y as they lie in memory.
//
// N = 8192, D = 2048: 512 tiles of 128 x 256 and 32 steps of 1024 cycles for 132 multiprocessors, four waves; a tile's
// epilogue reads 128 KiB, loaded ahead by the TMA, and writes 64 KiB.
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
  using Product = HopperMultiply<T, 256, 4, 2, true, VIEW == 0>;
  using Place = typename Product::Place;
  static constexpr int cluster = Product::CLUSTER;
  struct Params {
    TensorMap a, b, own, other;
    InputGrad p;
    EpilogueMatrices m;
    int works;
  };
  struct alignas(16) Weights {
    float p, y, x, offset;
  };
  static constexpr const char* name = "direct_grad";
  static constexpr int epilogue_bytes = Product::N * sizeof(Weights);

  const Params& params;
  BARLOW_DEVICE explicit DirectGradJob(const Params& p) : params(p) {}

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
    for (int c = 0; c < Product::N; c += box_columns) {
      Product::load_boxes(ring, params.own, &params.other, row, column + c);
    }
  }

  BARLOW_DEVICE void consume(Place& ring, int work) const {
    const InputGrad& p = params.p;
    int row, column;
    place(work, row, column);
    Weights* const weights = reinterpret_cast<Weights*>(Product::epilogue_memory());
    Consumers::barrier();  // the last tile's weights have been read
    {
      Combination<1> w;
      direct_weights(p, VIEW, column + thread(), w);
      weights[thread()] = {w.weight_p[0], w.weight_y[0], w.weight_x[0] * w.scale_x[0],
                           w.weight_x[0] * w.offset_x[0] + w.offset_y[0]};
    }
    Consumers::barrier();
    typename Product::Accumulator acc;
    Product::multiply(ring, acc, ceil_div(p.d, Product::K));
#pragma unroll
    for (int c = 0; c < Product::N / box_columns; ++c) {
      char* const boxes = Product::wait(ring);
#pragma unroll
      for (int j = 0; j < box_fragments; ++j) {
        const Weights* const w = weights + Product::column_of(c * box_fragments + j);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float x[2], y[2];
          unpack_two<T>(*in_box(boxes + Product::x_box, j, h), x);
          unpack_two<T>(*in_box(boxes + Product::y_box, j, h), y);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float product = acc[0][c * box_fragments + j][2 * h + e];
            x[e] = w[e].p * product + (w[e].y * y[e] + (w[e].x * x[e] + w[e].offset));
          }
          *in_box(boxes + Product::x_box, j, h) = pack_two<T>(x[0], x[1]);
        }
      }
      store_box<T>(boxes + Product::x_box, params.m.grad, params.m.grad_vectors, p.n, p.d, row + warp() * 16,
                   column + c * box_columns);
      Product::done(ring);
    }
  }
};

template <class T, int VIEW>
void launch_direct_grad(const InputGrad& p, Stream stream) {
  using Job = DirectGradJob<T, VIEW>;
  using Kernel = HopperKernel<Job>;
  const auto what = [&p] { return launch_name(Kernel::name, p.n, p.d); };
  typename Kernel::Params params{};
  params.p = p;
  params.a = Job::Product::a_map(p.hat[1 - VIEW], p.n, p.d, what);
  params.b = Job::Product::b_map(p.product, p.d, p.d, what);
  params.own = tensor_map(p.own[VIEW], p.n, p.d, Job::Product::M, what);
  params.other = tensor_map(p.own[1 - VIEW], p.n, p.d, Job::Product::M, what);
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
  return is_hopper(device) && clusters_at_once<HopperKernel<DirectGradJob<bfloat16, 0>>>(device) > 0 &&
         hopper_fills(device, 2, ceil_div(p.n, 256) * ceil_div(p.d, 256)) && has_tensor_map(p.hat[0]) &&
         has_tensor_map(p.hat[1]) && has_tensor_map(p.product) && hopper_can_finish(p);
}

void hopper_direct_grad(const InputGrad& p, Stream stream) {
  const DeviceGuard guard(stream.device);  // before the tensor maps, which need its context
  p.hat[0].dtype == DType::bfloat16 ? both_views<bfloat16>(p, stream) : both_views<float16>(p, stream);
}

}  // namespace barlow
