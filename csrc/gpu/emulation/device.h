// emulation/device.h: device.h's primitives on a CPU. Included by device.h alone.
//
// Each does what the PTX ISA says of the instruction, fragment by fragment, tells races.h what it orders, and can be left
// out (sites.h). What hardware does later, copy_async, ends when schedule.h says, at the latest when somebody waits.
#pragma once

#include <cmath>
#include <map>

#include "fibers.h"

namespace barlow {

// ---- Where a thread is ---------------------------------------------------------------------------------------------

BARLOW_UNWATCHED inline int thread() { return emulation::running()->current % emulation::running()->threads; }
BARLOW_UNWATCHED inline int block_id() { return emulation::running()->block + emulation::running()->rank(); }
BARLOW_UNWATCHED inline int grid_size() { return emulation::running()->blocks; }
BARLOW_UNWATCHED inline char* shared_memory() { return emulation::running()->shared[emulation::running()->rank()]; }

// ---- Threads that wait for each other, and talk ---------------------------------------------------------------------

inline void barrier(Site site = Site::here()) {
  if (emulation::dropped(site)) return;
  emulation::meet(0, thread(), emulation::running()->threads, "barrier", emulation::Orders::memory, nullptr,
                  [](auto&) {});
}

namespace emulation {
// A collective operation of this thread's warp. Lanes that exchange values order nothing by it.
template <class Argument, class Act>
void warp_meet(const char* name, Argument& argument, Act act, Orders orders = Orders::nothing) {
  meet(1 + thread() / 32, thread() % 32, 32, name, orders, &argument, [&act](const std::vector<void*>& arguments) {
    act([&arguments](int lane) -> Argument& { return *static_cast<Argument*>(arguments[lane]); });
  });
}
}  // namespace emulation

inline void warp_barrier(Site site = Site::here()) {
  if (emulation::dropped(site)) return;
  int nothing = 0;
  emulation::warp_meet("warp_barrier", nothing, [](auto) {}, emulation::Orders::memory);
}

template <class T>
T shuffle_xor(T x, int mask) {
  struct Lane {
    T given, taken;
    int mask;
  } mine{x, T(), mask};
  emulation::warp_meet("shuffle_xor", mine, [](auto lane) {
    for (int l = 0; l < 32; ++l) lane(l).taken = lane(l ^ lane(l).mask).given;
  });
  return mine.taken;
}

inline int draw_ticket(int* counter) {
  emulation::pause(2);
  int ticket;
  {
    const emulation::races::Quiet quiet;
    emulation::races::update(counter, sizeof(int));
    emulation::races::ticket(counter);
    ticket = (*counter)++;
  }
  emulation::pause(2);
  return ticket;
}
inline void reset_tickets(int* counter) {
  const emulation::races::Quiet quiet;
  emulation::races::update(counter, sizeof(int));
  *counter = 0;
}
inline void fence_device(Site site = Site::here()) {
  if (emulation::dropped(site)) return;
  emulation::races::fence_device();
}

// ---- Numbers --------------------------------------------------------------------------------------------------------

BARLOW_UNWATCHED inline float bits_to_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
BARLOW_UNWATCHED inline uint32_t float_to_bits(float x) {
  uint32_t y;
  std::memcpy(&y, &x, 4);
  return y;
}
BARLOW_UNWATCHED inline float to_float(bfloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
BARLOW_UNWATCHED inline float to_float(float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t exponent = (x.bits >> 10) & 31, fraction = x.bits & 0x3ff;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000 | fraction << 13);
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                   : std::ldexp(static_cast<float>(fraction | 0x400), static_cast<int>(exponent) - 25);
  return bits_to_float(sign | float_to_bits(size));
}
template <class T>
uint32_t to_bits16(float x);
template <>
inline uint32_t to_bits16<bfloat16>(float x) {
  const uint32_t bits = float_to_bits(x);
  if (std::isnan(x)) return 0x7fff;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
template <>
inline uint32_t to_bits16<float16>(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint32_t sign = (float_to_bits(x) >> 16) & 0x8000;
  const float size = std::fabs(x);
  if (size >= 65520.f) return sign | 0x7c00;
  int exponent;
  std::frexp(size, &exponent);                                         // size = [0.5, 1) * 2^exponent
  const int last = size == 0 || exponent < -13 ? -24 : exponent - 11;  // the weight of the last bit that is kept
  const float steps = std::nearbyint(std::ldexp(size, -last));         // to nearest, ties to even
  const uint32_t bits = static_cast<uint32_t>(steps);
  return sign | (last == -24 ? bits : (static_cast<uint32_t>(last + 24) << 10) + bits);
}
template <class T>
uint32_t pack_two(float low, float high) {
  return to_bits16<T>(low) | to_bits16<T>(high) << 16;
}
inline uint32_t to_tf32(float x) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7f800000) == 0x7f800000) return bits;
  return (bits + 0x1000) & 0xffffe000;
}

// ---- Memory ---------------------------------------------------------------------------------------------------------

template <class V>
V load(const V* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(V) != 0) emulation::fail("a load from an address that is not aligned");
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
V load_from_l2(const V* p) {
  return load(p);
}
inline void store(Vec16* p, const Vec16& v) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) emulation::fail("a store to an address that is not aligned");
  std::memcpy(static_cast<void*>(p), &v, 16);
}

inline void copy_async(void* to, const void* from, int bytes) {
  if (bytes < 0 || bytes > 16) emulation::fail("copy_async of " + std::to_string(bytes) + " bytes");
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || (bytes > 0 && reinterpret_cast<uintptr_t>(from) % 16 != 0)) {
    emulation::fail("copy_async between addresses that are not aligned");
  }
  const emulation::races::Quiet quiet;
  emulation::races::copy(to, from, bytes);
  emulation::running()->fibers[emulation::running()->current].copies.push_back(emulation::start([=] {
    std::memcpy(to, from, bytes);
    std::memset(static_cast<char*>(to) + bytes, 0, 16 - bytes);
  }));
}
inline void copy_async_commit() {
  const emulation::races::Quiet quiet;
  emulation::races::commit_copies();
  auto& fiber = emulation::running()->fibers[emulation::running()->current];
  fiber.groups.push_back(std::move(fiber.copies));
  fiber.copies.clear();
}
template <int PENDING>
void copy_async_wait(Site site = Site::here()) {
  if (emulation::dropped(site)) return;
  const emulation::races::Quiet quiet;
  emulation::races::wait_copies(PENDING);
  auto& groups = emulation::running()->fibers[emulation::running()->current].groups;
  while (groups.size() > PENDING) {
    for (const auto& copy : groups.front()) copy->finish();
    groups.erase(groups.begin());
  }
}

// ---- Tensor cores ---------------------------------------------------------------------------------------------------

namespace emulation {
inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
  struct Lane {
    const char* row;
    uint32_t (*r)[4];
    bool transposed;
  } mine{static_cast<const char*>(row), &r, transposed};
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("load_matrices from a row that is not aligned");
  races::read(row, 16);
  warp_meet("load_matrices", mine, [](auto lane) BARLOW_UNWATCHED {
    for (int m = 0; m < 4; ++m) {
      uint16_t matrix[8][8];
      for (int i = 0; i < 8; ++i) std::memcpy(matrix[i], lane(8 * m + i).row, 16);
      for (int l = 0; l < 32; ++l) {
        uint32_t both = 0;
        for (int h = 1; h >= 0; --h) {
          const int i = l / 4, j = 2 * (l % 4) + h;
          both = both << 16 | (lane(l).transposed ? matrix[j][i] : matrix[i][j]);
        }
        (*lane(l).r)[m] = both;
      }
    }
  });
}

// The numbers of a fragment of a warp's mma: PTX ISA, "Matrix fragments for mma.m16n8k16" and "... m16n8k8" (.tf32).
template <class T>
struct Fragment {
  static constexpr int k = 16;
  BARLOW_UNWATCHED static float a(const uint32_t (&r)[4][32], int m, int kk) {
    return half(r[(m >= 8) + 2 * (kk >= 8)][m % 8 * 4 + kk % 8 / 2], kk);
  }
  BARLOW_UNWATCHED static float b(const uint32_t (&r)[2][32], int kk, int n) {
    return half(r[kk >= 8][n * 4 + kk % 8 / 2], kk);
  }
  BARLOW_UNWATCHED static float half(uint32_t both, int kk) {
    return to_float(T{static_cast<uint16_t>(kk % 2 ? both >> 16 : both & 0xffff)});
  }
};
template <>
struct Fragment<float> {
  static constexpr int k = 8;
  BARLOW_UNWATCHED static float a(const uint32_t (&r)[4][32], int m, int kk) {
    return tf32(r[(m >= 8) + 2 * (kk >= 4)][m % 8 * 4 + kk % 4]);
  }
  BARLOW_UNWATCHED static float b(const uint32_t (&r)[2][32], int kk, int n) {
    return tf32(r[kk >= 4][n * 4 + kk % 4]);
  }
  BARLOW_UNWATCHED static float tf32(uint32_t bits) {
    return bits_to_float(bits & 0xffffe000);
  }  // the others are not looked at
};
}  // namespace emulation

inline void load_matrices(uint32_t (&r)[4], const void* row) { emulation::load_matrices(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { emulation::load_matrices(r, row, true); }

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Lane {
    float (*d)[4];
    const uint32_t (*a)[4];
    const uint32_t (*b)[2];
  } mine{&d, &a, &b};
  emulation::warp_meet("mma", mine, [](auto lane) BARLOW_UNWATCHED {
    using Fragment = emulation::Fragment<T>;
    uint32_t a_words[4][32], b_words[2][32];
    for (int l = 0; l < 32; ++l) {
      for (int i = 0; i < 4; ++i) a_words[i][l] = (*lane(l).a)[i];
      for (int i = 0; i < 2; ++i) b_words[i][l] = (*lane(l).b)[i];
    }
    float a_values[16][Fragment::k], b_values[Fragment::k][8];
    for (int kk = 0; kk < Fragment::k; ++kk) {
      for (int m = 0; m < 16; ++m) a_values[m][kk] = Fragment::a(a_words, m, kk);
      for (int n = 0; n < 8; ++n) b_values[kk][n] = Fragment::b(b_words, kk, n);
    }
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 8; ++n) {
        double sum = 0;
        for (int kk = 0; kk < Fragment::k; ++kk) sum += static_cast<double>(a_values[m][kk]) * b_values[kk][n];
        float& to = (*lane(m % 8 * 4 + n / 2).d)[(m >= 8) * 2 + n % 2];
        to = static_cast<float>(to + sum);
      }
    }
  });
}

// ---- The host's side ------------------------------------------------------------------------------------------------

struct DeviceInfo {
  int multiprocessors = 8;
  int shared_bytes = 227 * 1024;
  int capability = 80;
  std::map<int, int> clusters;  // of that many blocks, at once; others: as many as have a multiprocessor for each block
};
inline DeviceInfo& emulated_device() {
  static DeviceInfo info;
  return info;
}
inline const DeviceInfo& device_info(int) { return emulated_device(); }

struct DeviceGuard {
  explicit DeviceGuard(int) {}
  ~DeviceGuard() {}
};
struct RelaxedCapture {
  ~RelaxedCapture() {}
};

namespace emulation {
template <class Kernel>
Entry entry_of(const typename Kernel::Params& params) {
  return {[](const void* p) { Kernel::run(*static_cast<const typename Kernel::Params*>(p)); }, &params, sizeof(params)};
}
}  // namespace emulation

template <class Kernel>
void prepare(int) {}

template <class Kernel>
void launch(int64_t blocks, int shared_bytes, Stream, const typename Kernel::Params& params, int n, int d) {
  (void)&Listing<Kernel, false, prepare<Kernel>>::done;
  const auto what = [=] { return launch_name(Kernel::name, n, d); };
  check_launch(what, n, d, blocks, shared_bytes, device_info(0).shared_bytes);
  emulation::run_blocks(blocks, Kernel::threads, shared_bytes, emulation::entry_of<Kernel>(params), what());
}

}  // namespace barlow
