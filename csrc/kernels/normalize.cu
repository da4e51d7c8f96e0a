// normalize on any GPU from sm_80: normalize.h's slabs in one block each, or in chunks of rows that go through memory.
#include "kernels/hopper_kernels.h"
#include "kernels/normalize.h"

namespace barlow {
namespace {

// All samples at once.
template <class T, int GROUPS>
struct NormalizeKernel {
  using Params = NormalizeParams;
  static constexpr const char* name = "normalize";
  static constexpr int threads = normalize_threads;
  static constexpr int blocks_per_sm = 2, shared_bytes = 0;

  static BARLOW_DEVICE void run(const Params& params) {
    const Slab<T, GROUPS> slab(params, block_id(), 0);
    slab.part_moments();
    slab.finish(1, [&](int, int feature) { return slab.own_moments(feature); });
    slab.store_hats();
  }
};

// In chunks of rows, where a slab has eight times 16 bytes.
constexpr int chunk_groups = 8;

BARLOW_DEVICE float* chunk_moments(const Normalize& p, int chunk) {
  return p.partials + chunk * moment_count * static_cast<int64_t>(p.d);
}

// First: each chunk's moments.
template <class T>
struct MomentsKernel {
  using Params = NormalizeParams;
  static constexpr const char* name = "normalize, moments";
  static constexpr int threads = normalize_threads;
  static constexpr int blocks_per_sm = 2, shared_bytes = 0;

  static BARLOW_DEVICE void run(const Params& params) {
    const Normalize& p = params.p;
    const Slab<T, chunk_groups> slab(params, block_id() % p.slabs, block_id() / p.slabs);
    slab.part_moments();
    barrier();
    float* const out = chunk_moments(p, slab.part);
    for (int i = thread(); i < moment_count * slab.columns; i += threads) {
      const int which = i / slab.columns, feature = i % slab.columns, column = slab.slab * slab.columns + feature;
      if (column < p.d) out[which * static_cast<int64_t>(p.d) + column] = slab.memory().moments[which][feature];
    }
  }
};

// Then a block for each slab combines them. What standardises a feature takes the place of its first chunk's moments.
template <class T>
struct CombineMomentsKernel {
  using Params = NormalizeParams;
  static constexpr const char* name = "normalize, combination";
  static constexpr int threads = normalize_threads;
  static constexpr int blocks_per_sm = 2, shared_bytes = sizeof(typename Slab<T, chunk_groups>::Memory);

  static BARLOW_DEVICE void run(const Params& params) {
    const Normalize& p = params.p;
    const Slab<T, chunk_groups> slab(params, block_id(), 0);
    slab.finish(p.chunks, [&](int chunk, int feature) {
      const int64_t d = p.d, column = slab.slab * slab.columns + feature;
      const float* const from = chunk_moments(p, chunk) + column;
      return column < d ? Moments{from[0], from[d], from[2 * d], from[3 * d], from[4 * d]} : Moments{};
    });
    if (!p.normalized || thread() >= slab.columns) return;
    const int column = slab.slab * slab.columns + thread();
    if (column >= p.d) return;
#pragma unroll
    for (int view = 0; view < 2; ++view) {
      float* const to = chunk_moments(p, 0) + 2 * view * static_cast<int64_t>(p.d) + column;
      to[0] = slab.memory().centre[view][thread()];
      to[p.d] = slab.memory().offset[view][thread()];
    }
  }
};

// And at last: each chunk standardised.
template <class T>
struct ApplyMomentsKernel {
  using Params = NormalizeParams;
  static constexpr const char* name = "normalize, apply";
  static constexpr int threads = normalize_threads;
  static constexpr int blocks_per_sm = 2, shared_bytes = 0;

  static BARLOW_DEVICE void run(const Params& params) {
    constexpr int E = per_vec<T>;
    const Normalize& p = params.p;
    const Slab<T, chunk_groups> slab(params, block_id() % p.slabs, block_id() / p.slabs);
    if (slab.count == 0) return;
#pragma unroll 1
    for (int view = 0; view < 2; ++view) {
      float centre[E], scale[E], offset[E];
      load_stat(chunk_moments(p, 0), 2 * view, p.d, slab.column, centre);
      load_stat(chunk_moments(p, 0), 2 * view + 1, p.d, slab.column, offset);
      load_stat(p.stats, stat_rstd + view, p.d, slab.column, scale);
      const Matrix &from = slab.z(view), &to = view == 0 ? p.a_hat : p.b_hat;
#pragma unroll 4
      for (int row = slab.begin + thread() / chunk_groups; row < slab.end; row += slab.lanes) {
        float x[E];
        load_row<T>(from, slab.vectors(view), row, slab.column, slab.count, x);
#pragma unroll
        for (int e = 0; e < E; ++e) x[e] = (x[e] - centre[e]) * scale[e] + offset[e];
        store_row_as<T>(to, params.hat_vectors, row, slab.column, slab.count, x);
      }
    }
  }
};

int slab_bytes(int rows, int groups, int size) {
  if (size == 4) {
    return groups == 8   ? Slab<float, 8>::bytes(rows)
           : groups == 4 ? Slab<float, 4>::bytes(rows)
                         : Slab<float, 2>::bytes(rows);
  }
  return groups == 8   ? Slab<bfloat16, 8>::bytes(rows)
         : groups == 4 ? Slab<bfloat16, 4>::bytes(rows)
                       : Slab<bfloat16, 2>::bytes(rows);
}

SlabLayout slab_layout(int n, int d, int size, int device) {
  const DeviceInfo& info = device_info(device);
  const int half = info.shared_bytes / 2 - 1024;  // of a multiprocessor: two blocks
  for (const int groups : {8, 4, 2}) {
    // Wide slabs read longer pieces of a row; narrow ones fill the chip.
    const bool fills = groups == 2 || ceil_div(d, groups * 16 / size) >= info.multiprocessors * groups / 4;
    if (!fills || slab_bytes(n, groups, size) > half) continue;
    // Not in pieces of 32 bytes, half of what memory hands out, where a cluster can read 64.
    if (groups == 2 && slab_bytes(n, 4, size) > half && hopper_normalize_parts(n, 4, device) > 1) continue;
    return {groups, n, 1, false};
  }
  for (const int groups : {4, 2}) {
    const int parts = hopper_normalize_parts(n, groups, device);
    if (parts > 1) return {groups, ceil_div(n, parts), ceil_div(n, ceil_div(n, parts)), true};
  }
  if (slab_bytes(n, 2, size) <= info.shared_bytes - 1024) return {2, n, 1, false};
  return {chunk_groups, chunk_rows, ceil_div(n, chunk_rows), false};
}

template <class T>
void launch_normalize(const NormalizeParams& params, const SlabLayout& layout, Stream stream) {
  const Normalize& p = params.p;
  const int shared = slab_bytes(params.rows, layout.groups, sizeof(T));
  if (layout.parts > 1) {
    const int64_t blocks = static_cast<int64_t>(p.slabs) * layout.parts;
    launch<MomentsKernel<T>>(blocks, shared, stream, params, p.n, p.d);
    launch<CombineMomentsKernel<T>>(p.slabs, CombineMomentsKernel<T>::shared_bytes, stream, params, p.n, p.d);
    if (p.normalized) launch<ApplyMomentsKernel<T>>(blocks, 0, stream, params, p.n, p.d);
  } else if (layout.groups == 8) {
    launch<NormalizeKernel<T, 8>>(p.slabs, shared, stream, params, p.n, p.d);
  } else if (layout.groups == 4) {
    launch<NormalizeKernel<T, 4>>(p.slabs, shared, stream, params, p.n, p.d);
  } else {
    launch<NormalizeKernel<T, 2>>(p.slabs, shared, stream, params, p.n, p.d);
  }
}

}  // namespace

NormalizePlan plan_normalize(int n, int d, DType dtype, int device) {
  const int size = dtype == DType::float32 ? 4 : 2;
  const SlabLayout layout = slab_layout(n, d, size, device);
  return {ceil_div(d, layout.groups * 16 / size), layout.cluster ? 1 : layout.parts};
}

void normalize(const Normalize& p, Stream stream) {
  const DType dtype = p.z_a.dtype;
  const SlabLayout layout = slab_layout(p.n, p.d, dtype == DType::float32 ? 4 : 2, stream.device);
  const NormalizeParams params = normalize_params(p, layout);
  if (layout.cluster) return hopper_normalize(params, layout, stream);
  switch (dtype) {
    case DType::float32:
      return launch_normalize<float>(params, layout, stream);
    case DType::bfloat16:
      return launch_normalize<bfloat16>(params, layout, stream);
    case DType::float16:
      return launch_normalize<float16>(params, layout, stream);
  }
}

}  // namespace barlow
