// Hopper's product in the emulation, with every combination of factors, one factor twice too, and tiles that are finished
// beside the next product, against plain loops: exit code 0 if all is right, 1 with a sentence if it is not.
// test_planted_faults.py builds it from csrc/ as it is, and from copies into which a fault was planted.
#include <cmath>
#include <cstdio>
#include <memory>

#include "blocks/hopper_epilogue.h"

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

// P + 2 x + y in bfloat16, by consumers and finishers.
struct FinishedJob {
  using Product = HopperMultiply<bfloat16, 256, 3, 2, true, true>;
  using Tile = HandOver<Product>;
  static constexpr int cluster = Product::CLUSTER;
  struct Params {
    TensorMap a, b;
    Matrix x, y, out;
    InputGrad p;  // n and d: rows and columns of P
    int k, works;
  };
  static constexpr const char* name = "finished";
  static constexpr int epilogue_bytes = sizeof(Tile::Memory);

  const Params& params;
  Tile tile;
  explicit FinishedJob(const Params& p)
      : params(p), tile(*reinterpret_cast<Tile::Memory*>(Product::epilogue_memory())) {}
  int row() const { return cluster_rank() * Product::M; }
  int steps() const { return ceil_div(params.k, Product::K); }

  void produce(Product::Place& ring, int work) const {
    if (lane() == 0) Product::load(ring, {&params.a, &params.b, row(), work * Product::N, 0, steps()});
  }
  void consume(Product::Place& ring, int) {
    Product::Accumulator acc;
    Product::multiply(ring, acc, steps());
    tile.wait_for_room();
    for (int box = 0; box < Tile::boxes; ++box) tile.put(acc, box);
    tile.give();
  }
  void finish(int work, bool last) {
    walk(work, finishers_share(last), [this] { tile.wait_for_tile(); });
    tile.take();
  }
  void help(int work) {
    walk(work, helpers_share(), [this] { tile.wait_for_last_tile(); });
  }
  template <class Wait>
  void walk(int work, RowShare share, Wait wait) {
    FinishedRows<bfloat16, 3> rows(params.x, params.y, params.out, params.p, share, row(), work * Product::N);
    wait();
    rows.each([this](int r, const float (&x)[8], const float (&y)[8], float (&out)[8]) {
      tile.get(r, out);
      for (int e = 0; e < 8; ++e) out[e] += 2 * x[e] + y[e];
    });
  }
};

// A matrix of 512 columns, random in -1 ... 1.
struct alignas(16) Factor {
  bfloat16 x[512 * 512];

  explicit Factor(uint32_t random) {
    for (bfloat16& number : x) {
      random = random * 1664525 + 1013904223;
      number = from_float<bfloat16>(static_cast<float>(random >> 8) / (1 << 23) - 1.f);
    }
  }
  float at(int row, int column) const { return to_float(x[row * 512 + column]); }
  Matrix matrix() { return Matrix{x, 512, 1, DType::bfloat16}; }
};

bool is_right(const char* name, double worst, double tolerance) {
  if (!(worst <= tolerance)) std::printf("%s is wrong by %g\n", name, worst);
  return worst <= tolerance;
}

bool finished_is_right() {
  using Kernel = HopperKernel<FinishedJob, true>;
  using Product = FinishedJob::Product;
  const int m = 2 * 128 - 30, n = 512 - 24, k = 100;  // two works
  const std::unique_ptr<Factor> a(new Factor(1)), b(new Factor(2)), x(new Factor(3)), y(new Factor(4));
  const std::unique_ptr<Factor> out(new Factor(5));
  const auto what = [] { return std::string("finished"); };
  Kernel::Params params{};
  params.a = Product::a_map(a->matrix(), m, k, what);
  params.b = Product::b_map(b->matrix(), n, k, what);
  params.x = x->matrix();
  params.y = y->matrix();
  params.out = out->matrix();
  params.p.n = m;
  params.p.d = n;
  params.k = k;
  params.works = 2;
  emulated_device().multiprocessors = 2;  // one cluster, which takes both works
  launch_clusters<Kernel>(2, Stream{}, params, m, n);
  double worst = 0;
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      double sum = 2 * x->at(i, j) + y->at(i, j);
      for (int f = 0; f < k; ++f) sum += static_cast<double>(a->at(i, f)) * b->at(j, f);
      const double error = std::fabs(out->at(i, j) - sum);
      worst = error <= worst ? worst : error;  // NaN stays
    }
  }
  return is_right("the finished tile", worst, 0.15);  // numbers of up to 20, rounded twice
}

template <int N, int CLUSTER, bool A_K_MAJOR, bool B_K_MAJOR, bool DIAGONAL = false>
bool product_is_right() {
  using Product = HopperMultiply<bfloat16, N, 3, CLUSTER, A_K_MAJOR, B_K_MAJOR>;
  using Kernel = HopperKernel<ProductJob<Product, DIAGONAL>>;
  const int works = DIAGONAL ? 1 : 2, k = 440;  // 7 steps
  const int m = CLUSTER * 128 - 30, n = DIAGONAL ? N - 40 : 2 * N - 20;
  const std::unique_ptr<Factor> a(new Factor(1)), another(new Factor(2));
  Factor* const b = DIAGONAL ? a.get() : another.get();
  const std::unique_ptr<float[]> p(new float[m * n]);
  const auto what = [] { return std::string("product"); };
  typename Kernel::Params params{};
  params.a = Product::a_map(a->matrix(), A_K_MAJOR ? m : k, A_K_MAJOR ? k : m, what);
  params.b = Product::b_map(b->matrix(), B_K_MAJOR ? n : k, B_K_MAJOR ? k : n, what);
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
        const float x = A_K_MAJOR ? a->at(i, f) : a->at(f, i), y = B_K_MAJOR ? b->at(j, f) : b->at(f, j);
        sum += static_cast<double>(x) * y;
      }
      const double error = std::fabs(p[i * n + j] - sum);
      worst = error <= worst ? worst : error;  // NaN stays
    }
  }
  return is_right("P", worst, 1e-4);
}

int main() {
  try {
    return product_is_right<128, 1, true, true>() && product_is_right<256, 2, true, true>() &&
                   product_is_right<256, 2, false, false>() && product_is_right<256, 4, true, false>() &&
                   product_is_right<128, 1, true, true, true>() && product_is_right<64, 1, true, true, true>() &&
                   finished_is_right()
               ? 0
               : 1;
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}
