// Hopper's gram over squares of 256 in the emulation, against a plain loop: exit code 0 if it is right, 1 with a sentence
// if it is not. Of 130 steps of a line each cluster has all, or a part that ends within another line.
// test_planted_faults.py builds it from csrc/ as it is, and from copies into which a fault was planted.
#include <cmath>
#include <cstdio>
#include <memory>
#include <vector>

#include "kernels/hopper_gram.cu"

using namespace barlow;

namespace {

constexpr int n = 200, d = 64 * 130 - 24, pitch = 64 * 130, k_pitch = 200;

struct alignas(16) View {
  bfloat16 x[n * pitch];
};

bool is_right(const View (&views)[2], const std::vector<double>& exact, int clusters) {
  using Job = SquareJob<bfloat16>;
  const auto matrix = [](const View& v) { return Matrix{const_cast<bfloat16*>(v.x), pitch, 1, DType::bfloat16}; };
  Gram p{};
  p.a_hat = matrix(views[0]);
  p.b_hat = matrix(views[1]);
  const SquareLayout layout = square_layout(n, d, clusters);
  const std::unique_ptr<Vec16[]> partials(new Vec16[layout.partial_tiles() * 256 * 256 / 4]);
  std::vector<double> inner(2);
  std::vector<int> counters(3);
  std::vector<uint32_t> k(n * k_pitch);  // two halves each
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
  emulated_device().multiprocessors = 2 * clusters;
  Job::Params params = gram_params<Job>(p);
  params.layout = layout;
  params.works = layout.clusters;
  launch_clusters<HopperKernel<Job>>(params.works, Stream{}, params, n, d);
  double worst = 0, product = 0;
  for (int i = 0; i < 2 * n; ++i) {
    for (int j = 0; j < n; ++j) {
      const bfloat16 got = reinterpret_cast<const bfloat16*>(k.data())[i * k_pitch + j];
      const double error = std::fabs(to_float(got) - exact[i * n + j] / d);
      worst = error <= worst ? worst : error;  // NaN stays
      if (i < n) product += exact[i * n + j] * exact[(n + i) * n + j];
    }
  }
  const double error = std::fabs(terms[2] * (static_cast<double>(n) * n) / product - 1);
  if (worst <= 2e-3 && error <= 1e-5 && counters == std::vector<int>(3)) return true;
  std::printf("K is wrong by %g, the inner product by %g\n", worst, error);
  return false;
}

}  // namespace

int main() {
  const std::unique_ptr<View[]> made(new View[2]());
  View(&views)[2] = reinterpret_cast<View(&)[2]>(made[0]);
  uint32_t random = 1;
  for (View& v : views) {
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < d; ++j) {
        random = random * 1664525 + 1013904223;
        v.x[i * pitch + j] = from_float<bfloat16>(static_cast<float>(random >> 8) / (1 << 23) - 1.f);
      }
    }
  }
  std::vector<double> exact(2 * n * n);
  std::vector<float> rows(n * d);
  for (int view = 0; view < 2; ++view) {
    for (int i = 0; i < n; ++i) {
      for (int f = 0; f < d; ++f) rows[i * d + f] = to_float(views[view].x[i * pitch + f]);
    }
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j <= i; ++j) {
        double sum = 0;
        for (int f = 0; f < d; ++f) sum += static_cast<double>(rows[i * d + f]) * rows[j * d + f];
        exact[(view * n + i) * n + j] = exact[(view * n + j) * n + i] = sum;
      }
    }
  }
  try {
    return is_right(views, exact, 1) && is_right(views, exact, 3) ? 0 : 1;
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}
