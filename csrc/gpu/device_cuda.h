// device_cuda.h: device.h's primitives on a GPU. Included by device.h alone.
#pragma once

#include <atomic>
#include <map>
#include <mutex>
#include <stdexcept>

namespace barlow {

// ---- Where a thread is ---------------------------------------------------------------------------------------------

BARLOW_DEVICE int thread() { return threadIdx.x; }
BARLOW_DEVICE int block_id() { return blockIdx.x; }
BARLOW_DEVICE int grid_size() { return gridDim.x; }

// The block's dynamic shared memory, 1024-byte aligned.
BARLOW_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}
BARLOW_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- Threads that wait for each other, and talk ---------------------------------------------------------------------

BARLOW_DEVICE void barrier() { __syncthreads(); }
BARLOW_DEVICE void warp_barrier() { __syncwarp(); }
BARLOW_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffff, x, mask); }
BARLOW_DEVICE double shuffle_xor(double x, int mask) { return __shfl_xor_sync(0xffffffff, x, mask); }

// A ticket from a counter in global memory. Between fences: what this thread could see before the first is visible, after
// the second, to whoever draws a later ticket.
BARLOW_DEVICE int draw_ticket(int* counter) {
  int ticket;
  asm volatile("atom.add.relaxed.gpu.global.s32 %0, [%1], 1;" : "=r"(ticket) : "l"(counter) : "memory");
  return ticket;
}
// Not a plain store: fences order what comes before the other blocks' tickets, not these themselves.
BARLOW_DEVICE void reset_tickets(int* counter) {
  asm volatile("st.relaxed.gpu.global.s32 [%0], 0;" ::"l"(counter) : "memory");
}
BARLOW_DEVICE void fence_device() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// ---- Numbers --------------------------------------------------------------------------------------------------------

BARLOW_DEVICE float bits_to_float(uint32_t x) { return __uint_as_float(x); }
BARLOW_DEVICE uint32_t float_to_bits(float x) { return __float_as_uint(x); }
BARLOW_DEVICE float to_float(bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
BARLOW_DEVICE float to_float(float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
// Two numbers rounded to nearest even, the first in the low half.
template <class T>
BARLOW_DEVICE uint32_t pack_two(float low, float high);
template <>
BARLOW_DEVICE uint32_t pack_two<bfloat16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
BARLOW_DEVICE uint32_t pack_two<float16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
// The nearest TF32 number, with float32's bits.
BARLOW_DEVICE uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// ---- Memory ---------------------------------------------------------------------------------------------------------

template <class V>
BARLOW_DEVICE V load(const V* p) {
  return *p;
}
template <>
BARLOW_DEVICE Vec8 load(const Vec8* p) {
  const uint2 v = *reinterpret_cast<const uint2*>(p);
  return {{v.x, v.y}};
}
template <>
BARLOW_DEVICE Vec16 load(const Vec16* p) {
  const uint4 v = *reinterpret_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
// From L2, past this multiprocessor's L1: what other blocks of the same launch wrote.
BARLOW_DEVICE Vec16 load_from_l2(const Vec16* p) {
  const uint4 v = __ldcg(reinterpret_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}
BARLOW_DEVICE double load_from_l2(const double* p) { return __ldcg(p); }
BARLOW_DEVICE float load_from_l2(const float* p) { return __ldcg(p); }
BARLOW_DEVICE void store(Vec16* p, const Vec16& v) {
  *reinterpret_cast<uint4*>(p) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}

// Starts a copy of 16 bytes from global to shared memory; of `bytes` of them, the others become 0.
BARLOW_DEVICE void copy_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
// The copies that this thread started since the last commit are a group.
BARLOW_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups of this thread but the latest PENDING.
template <int PENDING>
BARLOW_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- Tensor cores, a warp at a time (PTX ISA, "Matrix multiply-accumulate operation using mma instruction") ---------

// Four 8 x 8 matrices of 16-bit numbers from shared memory; lane l gives the address of row l % 8 of matrix l / 8.
BARLOW_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
BARLOW_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// d += a b: (16, 16) by (16, 8) in half precision, (16, 8) by (8, 8) in TF32.
template <class T>
BARLOW_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
#define BARLOW_MMA(TYPE, SHAPE, NAME)                                                           \
  template <>                                                                                   \
  BARLOW_DEVICE void mma<TYPE>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned." SHAPE ".row.col.f32." NAME "." NAME                        \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"         \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));           \
  }
BARLOW_MMA(bfloat16, "m16n8k16", "bf16")
BARLOW_MMA(float16, "m16n8k16", "f16")
BARLOW_MMA(float, "m16n8k8", "tf32")
#undef BARLOW_MMA

// ---- The host's side ------------------------------------------------------------------------------------------------

// Throws where a CUDA call failed; `what` says which, when asked.
template <class What>
void check(cudaError_t error, const What& what) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // not to be found again by the next call
    throw std::runtime_error(what() + ": " + cudaGetErrorString(error));
  }
}

// Makes a device the current one, and the earlier one again at the end. Always: a thread whose device is right may still
// have no context, as PyTorch's backward threads before their first launch.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    const auto what = [device] { return "making device " + std::to_string(device) + " the current one"; };
    check(cudaGetDevice(&before_), what);
    check(cudaSetDevice(device), what);
    now_ = device;
  }
  ~DeviceGuard() {
    if (now_ != before_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0, now_ = 0;
};

// Within its life this thread may load kernels although a stream is being captured: nothing of it belongs to the graph.
class RelaxedCapture {
 public:
  RelaxedCapture() { exchange(); }
  ~RelaxedCapture() { exchange(); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  void exchange() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

struct DeviceInfo {
  int multiprocessors = 0;
  int shared_bytes = 0;  // that a block may use
  int capability = 0;    // 90 is compute capability 9.0
};

inline const DeviceInfo& device_info(int device) {
  static std::mutex mutex;
  static std::map<int, DeviceInfo> known;
  const std::lock_guard<std::mutex> lock(mutex);
  DeviceInfo& info = known[device];
  if (info.multiprocessors == 0) {
    const auto get = [device](cudaDeviceAttr attribute) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, attribute, device),
            [device] { return "asking device " + std::to_string(device); });
      return value;
    };
    info.shared_bytes = get(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    info.capability = 10 * get(cudaDevAttrComputeCapabilityMajor) + get(cudaDevAttrComputeCapabilityMinor);
    info.multiprocessors = get(cudaDevAttrMultiProcessorCount);
  }
  return info;
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::threads, Kernel::blocks_per_sm)
    entry(const __grid_constant__ typename Kernel::Params params) {
  Kernel::run(params);
}

// Loads a kernel onto a device, once, and lets it use all of the shared memory. The device is the current one.
template <class Function>
void prepare_kernel(std::atomic<uint64_t>& prepared, Function* kernel, const char* name, int device) {
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((prepared.load(std::memory_order_acquire) & bit) != 0) return;
  const auto what = [=] { return std::string(name) + ": loading it onto device " + std::to_string(device); };
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), what);
  const int bytes = device_info(device).shared_bytes - static_cast<int>(attributes.sharedSizeBytes);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), what);
  prepared.fetch_or(bit, std::memory_order_release);
}
template <class Kernel>
void prepare(int device) {
  static std::atomic<uint64_t> prepared{0};  // a bit each device
  prepare_kernel(prepared, entry<Kernel>, Kernel::name, device);
}

// Runs Kernel on `blocks` blocks. n and d are for the error message.
template <class Kernel>
void launch(int64_t blocks, int shared_bytes, Stream stream, const typename Kernel::Params& params, int n, int d) {
  (void)&Listing<Kernel, false, prepare<Kernel>>::done;
  const auto what = [=] { return launch_name(Kernel::name, n, d); };
  const DeviceInfo& info = device_info(stream.device);
  check_launch(what, n, d, blocks, shared_bytes, info.shared_bytes);
  const DeviceGuard guard(stream.device);
  prepare<Kernel>(stream.device);
  entry<Kernel>
      <<<static_cast<unsigned>(blocks), Kernel::threads, shared_bytes, static_cast<cudaStream_t>(stream.handle)>>>(
          params);
  check(cudaGetLastError(), what);
}

}  // namespace barlow
