// The gram kernel in the emulation, against a plain loop: exit code 0 if it is right, 1 with a sentence if it is not.
// test_planted_faults.py builds it from csrc/ as it is, and from copies into which a fault was planted.
#include <cmath>
#include <cstdio>
#include <memory>

#include "kernels/gram.h"

using namespace barlow;

int main() {
  const int n = 70, d = 200, pitch = 200, k_pitch = 72;
  std::unique_ptr<bfloat16[]> x[2], k(new bfloat16[2 * n * k_pitch]);
  uint32_t random = 1;
  for (auto& view : x) {
    view.reset(new bfloat16[n * pitch]);
    for (int i = 0; i < n * pitch; ++i) {
      random = random * 1664525 + 1013904223;
      view[i] = from_float<bfloat16>(static_cast<float>(random >> 8) / (1 << 23) - 1.f);
    }
  }
  using Product = Multiply<bfloat16, 64, 64, 2, 2, 4, true, true, false, true>;
  using Kernel = GramKernel<Product>;
  const int tiles = 3, split = 2, steps = 2;  // 2 x 2 blocks' lower triangle; 4 steps of 64 features in two slices
  std::unique_ptr<float[]> partials(new float[split * 2 * tiles * 64 * 64]);
  std::unique_ptr<double[]> inner(new double[tiles]);
  std::unique_ptr<int[]> counters(new int[tiles + 1]());
  const double sums[2] = {0, 0};
  float terms[3];
  const auto matrix = [](bfloat16* data, int64_t stride) { return Matrix{data, stride, 1, DType::bfloat16}; };
  Gram p{};
  p.a_hat = matrix(x[0].get(), pitch);
  p.b_hat = matrix(x[1].get(), pitch);
  p.k = matrix(k.get(), k_pitch);
  p.partials = partials.get();
  p.inner = inner.get();
  p.sums = sums;
  p.counters = counters.get();
  p.loss = terms;
  p.on_diag = terms + 1;
  p.off_diag = terms + 2;
  p.n = n;
  p.d = d;
  p.slabs = 1;
  p.block = 64;
  p.split = split;
  p.steps = steps;
  p.lambd = p.scale = 1.f;
  const Operand operands[2] = {{x[0].get(), pitch, 1, n, true}, {x[1].get(), pitch, 1, n, true}};
  try {
    launch<Kernel>(2 * tiles * split, Kernel::shared_bytes, Stream{}, {p, {operands[0], operands[1]}, tiles, 1}, n, d);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  double worst = 0;
  for (int view = 0; view < 2; ++view) {
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < n; ++j) {
        double sum = 0;
        for (int f = 0; f < d; ++f) {
          sum += static_cast<double>(to_float(x[view][i * pitch + f])) * to_float(x[view][j * pitch + f]);
        }
        const double error = std::fabs(to_float(k[(view * n + i) * k_pitch + j]) - sum / d);
        worst = error <= worst ? worst : error;  // NaN stays
      }
    }
  }
  if (worst <= 2e-3) return 0;
  std::printf("K is wrong by %g\n", worst);
  return 1;
}
