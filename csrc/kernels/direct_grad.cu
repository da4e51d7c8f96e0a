// direct_grad on any GPU from sm_80: direct_grad.h with multiply.h's product.
#include "blocks/grouped.h"
#include "kernels/direct_grad.h"
#include "kernels/hopper_kernels.h"

namespace barlow {
namespace {

template <class Product, int VIEW>
struct DirectGradKernel {
  using Rows = Tile<typename Product::T, Product::M, Product::N, Product::threads>;
  struct Params {
    InputGrad p;
    Operand other, c;
    EpilogueMatrices m;
  };
  static constexpr const char* name = "direct_grad";
  static constexpr int threads = Product::threads;
  static constexpr int blocks_per_sm = 1;
  static constexpr int shared_bytes = larger(Product::shared_bytes, Rows::bytes);

  static BARLOW_DEVICE void run(const Params& params) {
    const InputGrad& p = params.p;
    int row, column;
    grouped_tile(block_id(), ceil_div(p.n, Product::M), ceil_div(p.d, Product::N), row, column);
    row *= Product::M;
    column *= Product::N;
    typename Product::Accumulator acc;
    Product::run(acc, params.other, params.c, row, column, 0, p.d, 1);
    float* const tile = reinterpret_cast<float*>(shared_memory());
    write_tile<Product, Rows::pitch>(acc, tile);
    barrier();
    finish_direct_grad<Product>(p, params.m, VIEW, tile, row, column);
  }
};

// P[n, i] = sum_j B_hat[n, j] C0[i, j] of view a reads C0 along k; P[n, j] = sum_i A_hat[n, i] C0[i, j] of view b, across.
template <class T, int M, int N, int WARPS_M, int WARPS_N, int STAGES, bool SPLIT, int VIEW>
void launch_direct_grad(const InputGrad& p, Stream stream) {
  using Product = Multiply<T, M, N, WARPS_M, WARPS_N, STAGES, true, VIEW == 0, SPLIT, SPLIT>;
  using Kernel = DirectGradKernel<Product, VIEW>;
  const Matrix& other = p.hat[1 - VIEW];
  const Matrix& c = p.product;
  typename Kernel::Params params{};
  params.p = p;
  params.other = {other.data, other.row_stride, other.column_stride, p.n, has_vectors(other)};
  params.c = {c.data, VIEW == 0 ? c.row_stride : 1, VIEW == 0 ? 1 : c.row_stride, p.d, has_vectors(c)};
  params.m = epilogue_matrices(p, VIEW);
  const int64_t blocks = static_cast<int64_t>(ceil_div(p.n, M)) * ceil_div(p.d, N);
  launch<Kernel>(blocks, Kernel::shared_bytes, stream, params, p.n, p.d);
}

template <class T, bool SPLIT, int VIEW>
void choose_direct_grad(const InputGrad& p, Stream stream) {
  // The larger tiles where they fill the chip.
  const int64_t large = static_cast<int64_t>(ceil_div(p.n, 128)) * ceil_div(p.d, 128);
  if (SPLIT || large < device_info(stream.device).multiprocessors) {
    launch_direct_grad<T, 64, 64, 2, 2, 3, SPLIT, VIEW>(p, stream);
  } else {
    launch_direct_grad<T, 128, 128, 2, 4, 3, false, VIEW>(p, stream);
  }
}

template <class T, bool SPLIT>
void both_views(const InputGrad& p, Stream stream) {
  if (p.grad[0].data != nullptr) choose_direct_grad<T, SPLIT, 0>(p, stream);
  if (p.grad[1].data != nullptr) choose_direct_grad<T, SPLIT, 1>(p, stream);
}

}  // namespace

void direct_grad(const InputGrad& p, Stream stream) {
  if (hopper_can_direct_grad(p, stream.device)) return hopper_direct_grad(p, stream);
  switch (p.hat[0].dtype) {
    case DType::bfloat16:
      return both_views<bfloat16, false>(p, stream);
    case DType::float16:
      return both_views<float16, false>(p, stream);
    case DType::float32:
      return p.precision == Precision::float32 ? both_views<float, true>(p, stream)
                                               : both_views<float, false>(p, stream);
  }
}

}  // namespace barlow
