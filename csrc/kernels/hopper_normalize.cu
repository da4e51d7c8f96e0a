// normalize on Hopper where N rows are too many for half of a multiprocessor: a cluster of blocks holds them, each block
// a part. They exchange moments, five numbers a feature, through distributed shared memory.
//
// N = 2048, D = 8192 in half precision: clusters of 4, 512 rows of 32 features each, 64 KiB a block; 256 slabs are 1024
// blocks, two of which a multiprocessor holds.
#include "gpu/hopper.h"
#include "kernels/hopper_kernels.h"
#include "kernels/normalize.h"

namespace barlow {
namespace {

constexpr int part_bytes = 112 * 1024;  // of shared memory: two blocks fit a multiprocessor

template <class T, int GROUPS, int CLUSTER>
struct HopperNormalizeKernel {
  using Params = NormalizeParams;
  static constexpr const char* name = "normalize";
  static constexpr int threads = normalize_threads, cluster = CLUSTER;
  static constexpr int blocks_per_sm = 2, shared_bytes = part_bytes;
  static constexpr bool persistent = false;

  static BARLOW_DEVICE void run(const Params& params) {
    const Slab<T, GROUPS> slab(params, block_id() / CLUSTER, cluster_rank());
    slab.part_moments();
    cluster_barrier();
    const auto& m = slab.memory();
    // CLUSTER, or fewer where the last blocks have no rows
    slab.finish(ceil_div(params.p.n, params.rows), [&](int part, int f) {
      return Moments{load_from_block(&m.moments[0][f], part), load_from_block(&m.moments[1][f], part),
                     load_from_block(&m.moments[2][f], part), load_from_block(&m.moments[3][f], part),
                     load_from_block(&m.moments[4][f], part)};
    });
    slab.store_hats();
    cluster_barrier();  // nobody leaves whose moments others still read
  }
};

constexpr int wide = 4, narrow = 2;  // GROUPS: pieces of a row of 64 bytes, and of 32

// The rows of a part that fit.
template <int GROUPS>
constexpr int most_rows() {
  const int room = part_bytes - static_cast<int>(sizeof(typename Slab<bfloat16, GROUPS>::Memory));
  return room / (2 * GROUPS * 16) / (normalize_threads / GROUPS) * (normalize_threads / GROUPS);
}

template <class T, int GROUPS, int CLUSTER>
void launch_normalize(const NormalizeParams& params, Stream stream) {
  using Kernel = HopperNormalizeKernel<T, GROUPS, CLUSTER>;
  launch_clusters<Kernel>(params.p.slabs, stream, params, params.p.n, params.p.d);
}

template <class T>
void choose_normalize(const NormalizeParams& params, const SlabLayout& layout, int parts, Stream stream) {
  if (layout.groups == narrow) return launch_normalize<T, narrow, 8>(params, stream);
  parts == 2 ? launch_normalize<T, wide, 2>(params, stream) : launch_normalize<T, wide, 4>(params, stream);
}

}  // namespace

int hopper_normalize_parts(int n, int groups, int device) {
  const auto fits = [=](int parts, int rows, int clusters) { return n <= parts * rows && clusters > 0; };
  if (!is_hopper(device)) return 0;
  if (groups == wide) {
    if (fits(2, most_rows<wide>(), clusters_at_once<HopperNormalizeKernel<bfloat16, wide, 2>>(device))) return 2;
    if (fits(4, most_rows<wide>(), clusters_at_once<HopperNormalizeKernel<bfloat16, wide, 4>>(device))) return 4;
  } else if (groups == narrow) {
    if (fits(8, most_rows<narrow>(), clusters_at_once<HopperNormalizeKernel<bfloat16, narrow, 8>>(device))) return 8;
  }
  return 0;
}

void hopper_normalize(const NormalizeParams& params, const SlabLayout& layout, Stream stream) {
  const DeviceGuard guard(stream.device);
  const int parts = hopper_normalize_parts(params.p.n, layout.groups, stream.device);
  switch (params.p.z_a.dtype) {
    case DType::float32:
      return choose_normalize<float>(params, layout, parts, stream);
    case DType::bfloat16:
      return choose_normalize<bfloat16>(params, layout, parts, stream);
    case DType::float16:
      return choose_normalize<float16>(params, layout, parts, stream);
  }
}

}  // namespace barlow
