// Hopper's product in the emulation, with every combination of factors, one factor twice too, against a plain loop: exit
// code 0 if it is right, 1 with a sentence if it is not. test_planted_faults.py builds it from csrc/ as it is, and from copies into which
// a fault was planted.
#include <cmath>
#include <cstdio>
#include <memory>

#include "blocks/hopper_multiply.h"

using namespace barlow;

template <class Product_, bool DIAGONAL>
struct ProductJob {
  using Product = Product_;
  static constexpr int cluster = Product::CLUSTER;
  struct Params {
    TensorMap a, b;
    float* p;  // [m, n]
    int m, n, k, works;
  };
  static constexpr const char* name = "product";
  static constexpr int epilogue_bytes = 0;

  const Params& params;
  explicit ProductJob(const Params& p) : params(p) {}
  int row() const { return cluster_rank() * Product::M; }
  int steps() const { return ceil_div(params.k, Product::K); }

  void produce(typename Product::Place& ring, int work) const {
    if (lane() == 0) Product::load(ring, {&params.a, &params.b, row(), work * Product::N, 0, steps(), DIAGONAL});
  }
  void consume(typename Product::Place& ring, int work) const {
    typename Product::Accumulator acc;
    Product::multiply(ring, acc, steps(), DIAGONAL);
    for (int j = 0; j < Product::COLUMNS; ++j) {
      for (int e = 0; e < 4; ++e) {
        const int m = row() + Product::row_of(0) + e / 2 * 8, n = work * Product::N + Product::column_of(j) + e % 2;
        if (m < params.m && n < params.n) params.p[m * params.n + n] = acc[0][j][e];
      }
    }
  }
};

template <int N, int CLUSTER, bool A_K_MAJOR, bool B_K_MAJOR, bool DIAGONAL = false>
bool is_right() {
  using Product = HopperMultiply<bfloat16, N, 3, CLUSTER, A_K_MAJOR, B_K_MAJOR>;
  using Kernel = HopperKernel<ProductJob<Product, DIAGONAL>>;
  const int works = DIAGONAL ? 1 : 2, k = 440;  // 7 steps
  const int m = CLUSTER * 128 - 30, n = DIAGONAL ? N - 40 : 2 * N - 20;
  struct alignas(16) Factor {
    bfloat16 x[512 * 512];
  };
  const std::unique_ptr<Factor> a(new Factor), another(new Factor);
  Factor* const b = DIAGONAL ? a.get() : another.get();
  const std::unique_ptr<float[]> p(new float[m * n]);
  uint32_t random = 1;
  for (int i = 0; i < 512 * 512; ++i) {
    for (Factor* f : {a.get(), another.get()}) {
      random = random * 1664525 + 1013904223;
      f->x[i] = from_float<bfloat16>(static_cast<float>(random >> 8) / (1 << 23) - 1.f);
    }
  }
  const auto matrix = [](Factor& f) { return Matrix{f.x, 512, 1, DType::bfloat16}; };
  const auto what = [] { return std::string("product"); };
  typename Kernel::Params params{};
  params.a = Product::a_map(matrix(*a), A_K_MAJOR ? m : k, A_K_MAJOR ? k : m, what);
  params.b = Product::b_map(matrix(*b), B_K_MAJOR ? n : k, B_K_MAJOR ? k : n, what);
  params.p = p.get();
  params.m = m;
  params.n = n;
  params.k = k;
  params.works = works;
  emulated_device().multiprocessors = CLUSTER;  // one cluster, which takes all works
  launch_clusters<Kernel>(works, Stream{}, params, m, n);
  double worst = 0;
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      double sum = 0;
      for (int f = 0; f < k; ++f) {
        sum += static_cast<double>(to_float(a->x[A_K_MAJOR ? i * 512 + f : f * 512 + i])) *
               to_float(b->x[B_K_MAJOR ? j * 512 + f : f * 512 + j]);
      }
      const double error = std::fabs(p[i * n + j] - sum);
      worst = error <= worst ? worst : error;  // NaN stays
    }
  }
  if (!(worst <= 1e-4)) std::printf("P is wrong by %g\n", worst);
  return worst <= 1e-4;
}

int main() {
  try {
    return is_right<128, 1, true, true>() && is_right<256, 2, true, true>() && is_right<256, 2, false, false>() &&
                   is_right<256, 4, true, false>() && is_right<128, 1, true, true, true>() &&
                   is_right<64, 1, true, true, true>()
               ? 0
               : 1;
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}
