// Hopper's gram in the emulation, against a plain loop: exit code 0 if it is right, 1 with a sentence if it is not. Over
// squares of 256: of 130 steps of a line each cluster has all, or a part that ends within another line. And over tiles:
// three of 128, two on the diagonal, and the one of 64.
// test_planted_faults.py builds it from csrc/ as it is, and from copies into which a fault was planted.
#include <cmath>
#include <cstdio>
#include <memory>
#include <type_traits>
#include <vector>

#include "kernels/hopper_gram.cu"

using namespace barlow;

namespace {

constexpr int all = 200, d = 64 * 130 - 24, pitch = 64 * 130, k_pitch = 200;

struct alignas(16) View {
  bfloat16 x[all * pitch];
};

// Of the first n rows. clusters: that share the squares, or 0 for tiles.
template <class Job>
bool is_right(const View (&views)[2], const std::vector<double>& exact, int n, int clusters) {
  constexpr bool squares = std::is_same_v<Job, SquareJob<bfloat16>>;
  const auto matrix = [](const View& v) { return Matrix{const_cast<bfloat16*>(v.x), pitch, 1, DType::bfloat16}; };
  Gram p{};
  p.a_hat = matrix(views[0]);
  p.b_hat = matrix(views[1]);
  const int rows = ceil_div(n, 128), tiles = rows * (rows + 1) / 2, parts = squares ? 2 : 8 * tiles;
  const SquareLayout layout = square_layout(n, d, squares ? clusters : 1);
  p.split = 2;
  p.steps = 65;
  const std::unique_ptr<Vec16[]> partials(new Vec16[layout.partial_tiles() * 256 * 256 / 4]);
  std::vector<double> inner(parts);
  std::vector<int> counters(parts + 1);
  std::vector<uint32_t> k(all * k_pitch);  // two halves each
  const double sums[2] = {0, 0};
  float terms[3];
  p.k = {k.data(), k_pitch, 1, DType::bfloat16};
  p.partials = reinterpret_cast<float*>(partials.get());
  p.inner = inner.data();
  p.sums = sums;
  p.counters = counters.data();
  p.loss = terms;
  p.on_diag = terms + 1;
  p.off_diag = terms + 2;
  p.n = n;
  p.d = d;
  p.slabs = 1;
  p.lambd = p.scale = 1.f;
  emulated_device().multiprocessors = squares ? 2 * clusters : 8;
  if constexpr (squares) {
    typename Job::Params params = gram_params<Job>(p);
    params.layout = layout;
    params.works = layout.clusters;
    launch_clusters<HopperKernel<Job>>(params.works, Stream{}, params, n, d);
  } else {
    launch_tiles<Job>(p, Stream{});
  }
  double worst = 0, product = 0;
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) {
      const double* const want[2] = {&exact[i * all + j], &exact[(all + i) * all + j]};
      for (int view = 0; view < 2; ++view) {
        const bfloat16 got = reinterpret_cast<const bfloat16*>(k.data())[(view * n + i) * k_pitch + j];
        const double error = std::fabs(to_float(got) - *want[view] / d);
        worst = error <= worst ? worst : error;  // NaN stays
      }
      product += *want[0] * *want[1];
    }
  }
  const double error = std::fabs(terms[2] * (static_cast<double>(n) * n) / product - 1);
  if (worst <= 2e-3 && error <= 1e-5 && counters == std::vector<int>(parts + 1)) return true;
  std::printf("K is wrong by %g, the inner product by %g\n", worst, error);
  return false;
}

}  // namespace

int main() {
  const std::unique_ptr<View[]> made(new View[2]());
  View(&views)[2] = reinterpret_cast<View(&)[2]>(made[0]);
  uint32_t random = 1;
  for (View& v : views) {
    for (int i = 0; i < all; ++i) {
      for (int j = 0; j < d; ++j) {
        random = random * 1664525 + 1013904223;
        v.x[i * pitch + j] = from_float<bfloat16>(static_cast<float>(random >> 8) / (1 << 23) - 1.f);
      }
    }
  }
  std::vector<double> exact(2 * all * all);
  std::vector<float> rows(all * d);
  for (int view = 0; view < 2; ++view) {
    for (int i = 0; i < all; ++i) {
      for (int f = 0; f < d; ++f) rows[i * d + f] = to_float(views[view].x[i * pitch + f]);
    }
    for (int i = 0; i < all; ++i) {
      for (int j = 0; j <= i; ++j) {
        double sum = 0;
        for (int f = 0; f < d; ++f) sum += static_cast<double>(rows[i * d + f]) * rows[j * d + f];
        exact[(view * all + i) * all + j] = exact[(view * all + j) * all + i] = sum;
      }
    }
  }
  try {
    return is_right<SquareJob<bfloat16>>(views, exact, all, 1) && is_right<SquareJob<bfloat16>>(views, exact, all, 3) &&
                   is_right<GramTileJob<bfloat16, 128>>(views, exact, all, 0) &&
                   is_right<GramTileJob<bfloat16, 64>>(views, exact, 60, 0)
               ? 0
               : 1;
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}
