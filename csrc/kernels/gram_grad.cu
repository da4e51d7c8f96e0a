// gram_grad on any GPU from sm_80: gram_grad.h with multiply.h's product.
#include "kernels/gram_grad.h"
#include "kernels/hopper_kernels.h"

namespace barlow {
namespace {

template <class Product>
struct GramGradKernel {
  using Slab = GramSlab<Product>;
  struct Params {
    InputGrad p;
    Operand k[2], hat[2];  // of each view: K of the other, and itself
    EpilogueMatrices m[2];
    int first_view, slabs, promote_every;
  };
  static constexpr const char* name = "gram_grad";
  static constexpr int threads = Product::threads;
  static constexpr int blocks_per_sm = 1;
  // The scratch lies behind the finished tile, where the product's stages were: 96 KiB for 128 x 128, of 99.
  static constexpr int shared_bytes = larger(Product::shared_bytes, Slab::Rows::bytes + Slab::scratch_bytes);

  static BARLOW_DEVICE void run(const Params& params) {
    const InputGrad& p = params.p;
    const int view = params.first_view + block_id() / params.slabs;
    const int column = block_id() % params.slabs * Product::N;
    const EpilogueMatrices& m = params.m[view];
    float* const tile = reinterpret_cast<float*>(shared_memory());
    float* const scratch = reinterpret_cast<float*>(shared_memory() + Slab::Rows::bytes);
    const bool one_tile = p.n <= Product::M;
    Slab slab;
    slab.begin(p, view, column);
    for (int row = 0; row < p.n; row += Product::M) {
      typename Product::Accumulator acc;
      Product::run(acc, params.k[view], params.hat[view], row, column, 0, p.n, params.promote_every);
      write_tile<Product, Slab::Rows::pitch>(acc, tile);
      barrier();
      if (one_tile && p.normalized) {
        slab.template rows<true, false>(p, m, tile, row);
      } else {
        slab.template rows<true, true>(p, m, tile, row);
      }
    }
    if (!p.normalized) return;
    slab.finish_mean(p, scratch);
    if (one_tile) {
      slab.complete();
      slab.template rows<false, true>(p, m, tile, 0);
    } else {
      slab.add_own(p, m);
    }
  }
};

// K is read along k, A_hat and B_hat along the features.
template <class T, int M, int N, int WARPS_M, int WARPS_N, int STAGES, bool SPLIT>
using GramGradProduct = Multiply<T, M, N, WARPS_M, WARPS_N, STAGES, true, false, SPLIT, SPLIT>;

template <class Product>
void launch_gram_grad(const InputGrad& p, Stream stream) {
  using Kernel = GramGradKernel<Product>;
  typename Kernel::Params params{};
  params.p = p;
  params.promote_every = 1;  // float32 alone: sums over N <= 8192 samples are short enough for halves
  params.slabs = ceil_div(p.d, Product::N);
  params.first_view = p.grad[0].data == nullptr ? 1 : 0;
  const int views = (p.grad[0].data != nullptr) + (p.grad[1].data != nullptr);
  const bool k_vectors = has_vectors(p.product);
  const int64_t size = p.product.dtype == DType::float32 ? 4 : 2;
  for (int view = 0; view < 2; ++view) {
    const int64_t offset = (1 - view) * p.n * p.product.row_stride * size;  // K of the other view
    params.k[view] = {static_cast<const char*>(p.product.data) + offset, p.product.row_stride, 1, p.n, k_vectors};
    const Matrix& hat = p.hat[view];
    params.hat[view] = {hat.data, hat.column_stride, hat.row_stride, p.d, has_vectors(hat)};
    params.m[view] = epilogue_matrices(p, view);
  }
  launch<Kernel>(static_cast<int64_t>(views) * params.slabs, Kernel::shared_bytes, stream, params, p.n, p.d);
}

template <class T, bool SPLIT>
void choose_gram_grad(const InputGrad& p, Stream stream) {
  if (p.n <= 64) return launch_gram_grad<GramGradProduct<T, 64, 64, 2, 2, 2, SPLIT>>(p, stream);
  if constexpr (SPLIT) {  // two sums and split fragments: 32 x 32 is what a warp's registers hold
    launch_gram_grad<GramGradProduct<T, 128, 64, 4, 2, 3, true>>(p, stream);
  } else {
    // Where N rows do not fit into one tile: narrower slabs where wide ones would leave multiprocessors idle.
    const bool few = 2 * ceil_div(p.d, 128) < device_info(stream.device).multiprocessors * 3 / 4;
    if (p.n <= 128) {
      launch_gram_grad<GramGradProduct<T, 128, 64, 4, 2, 3, false>>(p, stream);
    } else if (p.n <= 256 || few) {
      launch_gram_grad<GramGradProduct<T, 256, 64, 8, 1, 2, false>>(p, stream);
    } else {
      launch_gram_grad<GramGradProduct<T, 128, 128, 2, 4, 3, false>>(p, stream);
    }
  }
}

}  // namespace

void gram_grad(const InputGrad& p, Stream stream) {
  if (hopper_can_gram_grad(p, stream.device)) return hopper_gram_grad(p, stream);
  switch (p.hat[0].dtype) {
    case DType::bfloat16:
      return choose_gram_grad<bfloat16, false>(p, stream);
    case DType::float16:
      return choose_gram_grad<float16, false>(p, stream);
    case DType::float32:
      return p.precision == Precision::float32 ? choose_gram_grad<float, true>(p, stream)
                                               : choose_gram_grad<float, false>(p, stream);
  }
}

}  // namespace barlow
