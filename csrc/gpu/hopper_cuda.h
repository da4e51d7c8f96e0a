// hopper_cuda.h: hopper.h's primitives on a GPU. Included by hopper.h alone.
#pragma once

#include <cuda.h>

namespace barlow {

// ---- Barriers in shared memory (PTX ISA, "mbarrier") ----------------------------------------------------------------

// A phase is over when `arrivals` threads have arrived and all expected bytes have been copied.
BARLOW_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the TMA and to the cluster, before the threads meet.
BARLOW_DEVICE void mbarrier_fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrives, and expects the bytes of copies that report to this barrier.
BARLOW_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
BARLOW_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives at the barrier of the same address in a block of the cluster.
BARLOW_DEVICE void mbarrier_arrive(uint64_t* barrier, int rank) {
  asm volatile(
      "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
// The same, and what this block's threads have written to shared memory is visible to who waits with
// mbarrier_wait_cluster.
BARLOW_DEVICE void mbarrier_arrive_cluster(uint64_t* barrier, int rank) {
  asm volatile(
      "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote]; }" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
BARLOW_DEVICE void mbarrier_wait_cluster(uint64_t* barrier, int phase) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again; }" ::"r"(shared_address(barrier)),
      "r"(phase)
      : "memory");
}
// Waits for the end of a phase; phases are counted modulo 2, and the one before the first is over.
BARLOW_DEVICE void mbarrier_wait(uint64_t* barrier, int phase) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again; }" ::"r"(shared_address(barrier)),
      "r"(phase)
      : "memory");
}

// ---- The tensor memory accelerator ----------------------------------------------------------------------------------

using TensorMap = CUtensorMap;  // 128 bytes, 64-byte aligned: a kernel parameter

// Copies the map's box at (row, column) to shared memory; what lies outside of the matrix becomes 0.
BARLOW_DEVICE void copy_box(void* to, const TensorMap& map, int row, int column, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}
// The same into the first BLOCKS blocks of the cluster: the same addresses, each block's own barrier.
template <int BLOCKS>
BARLOW_DEVICE void copy_box_to_all(void* to, const TensorMap& map, int row, int column, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%4, %5}], [%2], %3;" ::"r"(shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(barrier)),
      "h"(static_cast<uint16_t>((1 << BLOCKS) - 1)), "r"(column), "r"(row)
      : "memory");
}

// A map is on its way to who copies with it first.
BARLOW_DEVICE void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}

// What this thread has read and written in shared memory comes before what the TMA does there later.
BARLOW_DEVICE void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- Warpgroups -----------------------------------------------------------------------------------------------------

// Registers and shared memory as written so far are what the following wgmma read.
BARLOW_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// The wgmma since the last commit are a group.
BARLOW_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for all groups but the latest PENDING.
template <int PENDING>
BARLOW_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the compiler from moving what it does with the accumulator across this place.
template <int COUNT>
BARLOW_DEVICE void pin_registers(float (&d)[COUNT][4]) {
#pragma unroll
  for (int j = 0; j < COUNT; ++j) {
    asm volatile("" : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])::"memory");
  }
}

// d = a b (+ d): (64, 16) by (16, N), both in shared memory. d[j]: rows g and g + 8 of the warp's 16, columns 2 t and
// 2 t + 1 of fragment j; lane = 4 g + t.
template <class T, int N, bool A_K_MAJOR, bool B_K_MAJOR>
struct Wgmma;

#define BARLOW_D1(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define BARLOW_D4(i) BARLOW_D1(i), BARLOW_D1(i + 1), BARLOW_D1(i + 2), BARLOW_D1(i + 3)
#define BARLOW_D16(i) BARLOW_D4(i), BARLOW_D4(i + 4), BARLOW_D4(i + 8), BARLOW_D4(i + 12)
#define BARLOW_WGMMA(TYPE, NAME, COLUMNS, REGISTERS, OPERANDS, A, B, ADD, A_ACROSS, B_ACROSS)                          \
  template <bool A_K_MAJOR, bool B_K_MAJOR>                                                                            \
  struct Wgmma<TYPE, COLUMNS, A_K_MAJOR, B_K_MAJOR> {                                                                  \
    static BARLOW_DEVICE void run(float (&d)[COLUMNS / 8][4], uint64_t a, uint64_t b, bool add) {                      \
      asm volatile("{ .reg .pred add; setp.ne.b32 add, " ADD                                                           \
                   ", 0;\n"                                                                                            \
                   "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." NAME "." NAME " {" REGISTERS "}, " A ", " B \
                   ", add, 1, 1, " A_ACROSS ", " B_ACROSS "; }"                                                        \
                   : OPERANDS                                                                                          \
                   : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(A_K_MAJOR ? 0 : 1), "n"(B_K_MAJOR ? 0 : 1));      \
    }                                                                                                                  \
  };
#define BARLOW_TEN(t) \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define BARLOW_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " BARLOW_TEN(1) "%20, %21, %22, %23, %24, %25, %26, %27, %28, " \
                                                           "%29, %30, %31"
#define BARLOW_SIXTY \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " BARLOW_TEN(1) BARLOW_TEN(2) BARLOW_TEN(3) BARLOW_TEN(4) BARLOW_TEN(5)
#define BARLOW_64 BARLOW_SIXTY "%60, %61, %62, %63"
#define BARLOW_128                                                                    \
  BARLOW_SIXTY BARLOW_TEN(6) BARLOW_TEN(7) BARLOW_TEN(8) BARLOW_TEN(9) BARLOW_TEN(10) \
      BARLOW_TEN(11) "%120, %121, %122, %123, %124, %125, %126, %127"
#define BARLOW_D32 BARLOW_D4(0), BARLOW_D4(4)
#define BARLOW_D64 BARLOW_D16(0)
#define BARLOW_D128 BARLOW_D16(0), BARLOW_D16(16)
BARLOW_WGMMA(bfloat16, "bf16", 64, BARLOW_32, BARLOW_D32, "%32", "%33", "%34", "%35", "%36")
BARLOW_WGMMA(float16, "f16", 64, BARLOW_32, BARLOW_D32, "%32", "%33", "%34", "%35", "%36")
BARLOW_WGMMA(bfloat16, "bf16", 128, BARLOW_64, BARLOW_D64, "%64", "%65", "%66", "%67", "%68")
BARLOW_WGMMA(float16, "f16", 128, BARLOW_64, BARLOW_D64, "%64", "%65", "%66", "%67", "%68")
BARLOW_WGMMA(bfloat16, "bf16", 256, BARLOW_128, BARLOW_D128, "%128", "%129", "%130", "%131", "%132")
BARLOW_WGMMA(float16, "f16", 256, BARLOW_128, BARLOW_D128, "%128", "%129", "%130", "%131", "%132")

// A warpgroup gives registers back, or takes more: what its threads may use from here on.
template <int COUNT>
BARLOW_DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
BARLOW_DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// A barrier for THREADS threads of the block, from thread FIRST on; ID 1 to 15.
template <int ID, int THREADS, int FIRST = 0>
BARLOW_DEVICE void barrier_of() {
  asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(THREADS) : "memory");
}

// ---- Clusters -------------------------------------------------------------------------------------------------------

BARLOW_DEVICE int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of the cluster. What they wrote to shared memory before is visible to all after.
BARLOW_DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// What lies at the same address in a block of the cluster.
BARLOW_DEVICE float load_from_block(const float* p, int rank) {
  float x;
  asm volatile(
      "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [remote]; }"
      : "=f"(x)
      : "r"(shared_address(p)), "r"(rank)
      : "memory");
  return x;
}

BARLOW_DEVICE Vec16 load_from_block(const Vec16* p, int rank) {
  Vec16 v;
  asm volatile(
      "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [remote]; }"
      : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
      : "r"(shared_address(p)), "r"(rank)
      : "memory");
  return v;
}

// ---- The host's side ------------------------------------------------------------------------------------------------

// The driver's function that makes tensor maps; the driver is not linked.
inline auto tensor_map_encoder() {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) {
      throw std::runtime_error("the driver has no cuTensorMapEncodeTiled: it is older than CUDA 12");
    }
    return reinterpret_cast<Encode>(function);
  }();
  return encode;
}

// For copies of boxes of `rows` rows of m, [m_rows, m_columns] of 16-bit numbers. `what` names the launch.
template <class What>
TensorMap tensor_map(const Matrix& m, int m_rows, int m_columns, int rows, const What& what) {
  TensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(m_columns), static_cast<cuuint64_t>(m_rows)};
  const cuuint64_t row_bytes[1] = {static_cast<cuuint64_t>(m.row_stride) * 2};
  const cuuint32_t box[2] = {box_columns, static_cast<cuuint32_t>(rows)}, steps[2] = {1, 1};
  const CUresult result = tensor_map_encoder()(
      &map, m.dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, m.data,
      sizes, row_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(what() + ": cuTensorMapEncodeTiled failed, CUresult " + std::to_string(result));
  }
  return map;
}

template <class Kernel>
__global__ void __cluster_dims__(Kernel::cluster, 1, 1) __launch_bounds__(Kernel::threads, Kernel::blocks_per_sm)
    cluster_entry(const __grid_constant__ typename Kernel::Params params) {
  Kernel::run(params);
}

template <class Kernel>
void prepare_clusters(int device) {
  static std::atomic<uint64_t> prepared{0};  // a bit each device
  prepare_kernel(prepared, cluster_entry<Kernel>, Kernel::name, device);
  tensor_map_encoder();
}

// How many of Kernel's clusters a device holds at once: 0 where none fits, as on a small part of a GPU.
template <class Kernel>
int clusters_at_once(int device) {
  (void)&Listing<Kernel, true, prepare_clusters<Kernel>>::done;
  static std::mutex mutex;
  static std::map<int, int> known;  // of each device
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  int most = 0;
  if (Kernel::shared_bytes <= device_info(device).shared_bytes) {
    const DeviceGuard guard(device);
    const RelaxedCapture relaxed;
    prepare_clusters<Kernel>(device);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(Kernel::cluster * device_info(device).multiprocessors);
    config.blockDim = dim3(Kernel::threads);
    config.dynamicSmemBytes = Kernel::shared_bytes;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = Kernel::cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
    check(cudaOccupancyMaxActiveClusters(&most, cluster_entry<Kernel>, &config),
          [] { return std::string(Kernel::name) + ": asking how many clusters fit"; });
  }
  return known[device] = most;
}

// Runs Kernel, whose blocks come in clusters. Those of a persistent kernel take work as long as there is any: it runs on
// as many clusters as the device holds at once, but not more than `clusters`. The caller has made the device the current
// one.
template <class Kernel>
void launch_clusters(int64_t clusters, Stream stream, const typename Kernel::Params& params, int n, int d) {
  const auto what = [=] { return launch_name(Kernel::name, n, d); };
  const int most = clusters_at_once<Kernel>(stream.device);
  if (most < 1) throw std::runtime_error(what() + ": no cluster fits on this device");
  const int64_t blocks = (Kernel::persistent ? smaller<int64_t>(clusters, most) : clusters) * Kernel::cluster;
  check_launch(what, n, d, blocks, Kernel::shared_bytes, device_info(stream.device).shared_bytes);
  cluster_entry<Kernel><<<static_cast<unsigned>(blocks), Kernel::threads, Kernel::shared_bytes,
                          static_cast<cudaStream_t>(stream.handle)>>>(params);
  check(cudaGetLastError(), what);
}

}  // namespace barlow
