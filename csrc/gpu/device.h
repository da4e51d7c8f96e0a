// device.h: everything the kernels ask of a GPU, one small function each. Nothing else in csrc/ holds PTX.
//
// Compiled by nvcc these are single instructions. With BARLOW_EMULATION the same names come from emulation/device.h,
// and the kernels are plain C++ that runs on a CPU: slowly, but with every read of shared memory that nobody wrote,
// every missing barrier and every index past an end there to be seen.
//
// A kernel is a struct:
//
//     struct SomeKernel {
//       struct Params { ... };                       // passed by value, at most 4 KB
//       static constexpr int threads = 256;          // a block
//       static constexpr int blocks_per_sm = 1;      // that must fit, which bounds the registers of a thread
//       static constexpr int shared_bytes = 0;       // of a block; 0 where they depend on the shape
//       static constexpr const char* name = "...";   // in error messages
//       static BARLOW_DEVICE void run(const Params&);
//     };
//
// and `launch<SomeKernel>(blocks, shared_bytes, stream, params, n, d)` runs it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <typeinfo>
#include <vector>

#include "kernels.h"

#ifdef BARLOW_EMULATION
#define BARLOW_DEVICE inline
#define BARLOW_HOST_DEVICE inline
// What a function that calls a barrier takes and hands on: where it was called (emulation/sites.h).
#define BARLOW_SITE Site site = Site::here()
#define BARLOW_AT_SITE site
#else
#include <cuda_runtime.h>
#define BARLOW_DEVICE __device__ __forceinline__
#define BARLOW_HOST_DEVICE __host__ __device__ __forceinline__
#define BARLOW_SITE
#define BARLOW_AT_SITE
#endif

namespace barlow {

// 16-bit floats as stored; arithmetic is in float32.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

struct alignas(8) Vec8 {
  uint32_t word[2];
};
// Four 32-bit words: the largest access of a thread.
struct alignas(16) Vec16 {
  uint32_t word[4];
};

BARLOW_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
BARLOW_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
BARLOW_HOST_DEVICE constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }
template <class T>
BARLOW_HOST_DEVICE constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
BARLOW_HOST_DEVICE constexpr T larger(T a, T b) {
  return a < b ? b : a;
}

// For error messages.
inline std::string launch_name(const char* kernel, int n, int d) {
  return std::string(kernel) + " (N = " + std::to_string(n) + ", D = " + std::to_string(d) + ")";
}

constexpr int largest_side = 1 << 21;  // of a matrix: its tiles of 64, squared, are 2^30

// Kernels read and write it 16 bytes at a time.
inline void check_aligned(const void* data, const char* name, const char* kernel, int n, int d) {
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0) {
    throw std::runtime_error(launch_name(kernel, n, d) + ": " + name + " must begin at a multiple of 16 bytes");
  }
}

// What a launch asks for must be there. `what` says which launch.
template <class What>
void check_launch(const What& what, int n, int d, int64_t blocks, int shared_bytes, int available) {
  if (larger(n, d) > largest_side) {
    throw std::runtime_error(what() + ": tiles are counted in 32 bits, for at most " + std::to_string(largest_side) +
                             " samples and features");
  }
  if (blocks < 1 || blocks > 0x7fffffff) {
    throw std::runtime_error(what() + ": cannot launch " + std::to_string(blocks) + " blocks");
  }
  if (shared_bytes > available) {
    throw std::runtime_error(what() + ": needs " + std::to_string(shared_bytes) +
                             " bytes of shared memory a block, this device has " + std::to_string(available));
  }
}

// The list of kernels.h's list_kernels: `launch` and `launch_clusters` put theirs there, by being compiled.
inline std::vector<ListedKernel>& listed_kernels() {
  static std::vector<ListedKernel> list;
  return list;
}
template <class Kernel, bool HOPPER, void (*PREPARE)(int)>
struct Listing {
  static bool add() {
    listed_kernels().push_back(
        {Kernel::name, typeid(Kernel).name(), Kernel::threads, Kernel::shared_bytes, HOPPER, PREPARE});
    return true;
  }
  static inline const bool done = add();  // before main, where `done` is used anywhere
};

}  // namespace barlow

#ifdef BARLOW_EMULATION
#include "gpu/emulation/device.h"
#else
#include "gpu/device_cuda.h"
#endif

namespace barlow {

// What both builds share, made of the above.

template <class T>
struct TypeOf;
template <>
struct TypeOf<float> {
  static constexpr DType dtype = DType::float32;
};
template <>
struct TypeOf<bfloat16> {
  static constexpr DType dtype = DType::bfloat16;
};
template <>
struct TypeOf<float16> {
  static constexpr DType dtype = DType::float16;
};

// The numbers in 16 bytes, converted to and from float32.
template <class T>
constexpr int per_vec = 16 / sizeof(T);

BARLOW_DEVICE void unpack(const Vec16& v, float (&x)[4], float) {
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = bits_to_float(v.word[i]);
}
template <class T>
BARLOW_DEVICE void unpack(const Vec16& v, float (&x)[8], T) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = to_float(T{static_cast<uint16_t>(v.word[i] & 0xffff)});
    x[2 * i + 1] = to_float(T{static_cast<uint16_t>(v.word[i] >> 16)});
  }
}
BARLOW_DEVICE Vec16 pack(const float (&x)[4], float) {
  Vec16 v;
#pragma unroll
  for (int i = 0; i < 4; ++i) v.word[i] = float_to_bits(x[i]);
  return v;
}
template <class T>
BARLOW_DEVICE Vec16 pack(const float (&x)[8], T) {
  Vec16 v;
#pragma unroll
  for (int i = 0; i < 4; ++i) v.word[i] = pack_two<T>(x[2 * i], x[2 * i + 1]);
  return v;
}

BARLOW_DEVICE float to_float(float x) { return x; }
template <class T>
BARLOW_DEVICE T from_float(float x) {
  return T{static_cast<uint16_t>(pack_two<T>(x, 0.f) & 0xffff)};
}
template <>
BARLOW_DEVICE float from_float<float>(float x) {
  return x;
}

BARLOW_DEVICE int lane() { return thread() % 32; }
BARLOW_DEVICE int warp() { return thread() / 32; }

// The threads that work on a tile together, and how they wait for each other. Here: all of a block.
template <int THREADS>
struct WholeBlock {
  static constexpr int threads = THREADS;
  static BARLOW_DEVICE void barrier(BARLOW_SITE) { barlow::barrier(BARLOW_AT_SITE); }
};

// The sum over a warp, the same bits in every lane. STEP: only lanes that differ by a multiple of it are added.
template <int STEP = 1, class T>
BARLOW_DEVICE T warp_sum(T x) {
#pragma unroll
  for (int mask = 16; mask >= STEP; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

}  // namespace barlow
