// emulation/hopper.h: hopper.h's primitives on a CPU. Included by hopper.h alone.
//
// What the hardware does by itself ends when schedule.h says: at once, at random, or as late as allowed, a box when
// somebody waits at its mbarrier, a wgmma when its warpgroup waits for it. For races.h the TMA and wgmma are actors of
// their own, between issue and wait, and see memory through the async proxy.
//
// A shared memory address is an offset from the block's first byte, which is 1024-byte aligned.
#pragma once

#include <map>

namespace barlow {

namespace emulation {

struct BytesBarrier {
  int arrivals = 0, missing = 0;
  int64_t bytes = 0;  // expected less arrived
  int64_t phase = 0;
  std::vector<Deferred> copies;  // perhaps not yet done
  int channel = 0;               // of the copies, which are numbered by phases
  races::Mailbox arrived, done;  // in this phase, and up to the last one
  int initialised_by = 0;        // fiber
  bool fenced = false;           // the TMA and the cluster see that
};

struct Warpgroup {
  bool fenced = false;
  Deferred last;                              // product: they end in order
  std::vector<Deferred> products;             // since the last commit
  std::vector<std::vector<Deferred>> groups;  // committed, not yet waited for
  int channel = races::new_channel();
  uint32_t committed = 0;
};

struct Hopper {
  std::map<std::pair<int, uint32_t>, BytesBarrier> barriers;  // by block of the cluster and address
  std::map<std::pair<int, int>, Warpgroup> warpgroups;
};

inline Hopper& hopper() {
  if (!running()->hopper) running()->hopper = std::make_shared<Hopper>();
  return *static_cast<Hopper*>(running()->hopper.get());
}
inline Warpgroup& warpgroup() { return hopper().warpgroups[{running()->rank(), thread() / 128}]; }

inline char* shared_at(int rank, uint32_t address, int64_t bytes) {
  Block& block = *running();
  if (address + bytes > block.shared_bytes) fail("shared memory address " + std::to_string(address) + " is outside");
  return block.shared[rank] + address;
}

constexpr uint64_t barrier_mark = 0x6d62617272696572;  // what an initialised barrier holds

inline BytesBarrier& barrier_at(int rank, uint32_t address) {
  uint64_t mark;
  std::memcpy(&mark, shared_at(rank, address, 8), 8);
  const auto found = hopper().barriers.find({rank, address});
  if (found == hopper().barriers.end()) fail("an mbarrier that nobody initialised");
  if (mark != barrier_mark) fail("an mbarrier that was written over");
  return found->second;
}

inline void end_phase_if_complete(BytesBarrier& barrier) {
  ++running()->progress;
  if (barrier.missing < 0) fail("more arrivals at an mbarrier than it expects");
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  barrier.missing = barrier.arrivals;
  barrier.done = barrier.arrived;
  ++barrier.phase;
}

BARLOW_UNWATCHED inline uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

}  // namespace emulation

inline int cluster_rank() { return emulation::running()->rank(); }
inline uint32_t shared_address(const void* p) {
  const int64_t offset = static_cast<const char*>(p) - shared_memory();
  if (offset < 0 || offset >= emulation::running()->shared_bytes) emulation::fail("not in this block's shared memory");
  return static_cast<uint32_t>(offset);
}

// ---- Barriers in shared memory --------------------------------------------------------------------------------------

inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  const emulation::races::Quiet quiet;
  if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0) emulation::fail("an mbarrier that is not aligned");
  emulation::races::write(barrier, 8);
  std::memcpy(barrier, &emulation::barrier_mark, 8);
  emulation::BytesBarrier fresh;
  fresh.arrivals = fresh.missing = arrivals;
  fresh.channel = emulation::races::new_channel();
  fresh.initialised_by = emulation::running()->current;
  emulation::hopper().barriers[{cluster_rank(), shared_address(barrier)}] = fresh;
}
inline void mbarrier_fence_init(Site site = Site::here()) {
  const emulation::races::Quiet quiet;
  if (emulation::dropped(site)) return;
  for (auto& [at, barrier] : emulation::hopper().barriers) {
    barrier.fenced |= barrier.initialised_by == emulation::running()->current;
  }
}

namespace emulation {
// An arrival of this thread at a barrier of block `rank`, by which those who wait learn what it did. scope: how far its
// release reaches; a remote arrival of own_block says only that this thread is done with what it read.
inline void arrive(uint64_t* barrier, int rank, int bytes, races::Scope scope) {
  pause(8);
  const races::Quiet quiet;
  if (rank >= running()->cluster) fail("no such block in this cluster");
  BytesBarrier& b = barrier_at(rank, shared_address(barrier));
  const bool remote = rank != cluster_rank();
  if (remote && !b.fenced) fail("an arrival at another block's mbarrier without mbarrier_fence_init");
  races::update(shared_at(rank, shared_address(barrier), 8), 8);
  b.arrived.leave(scope, remote);
  b.bytes += bytes;
  --b.missing;
  end_phase_if_complete(b);
}
inline void wait(uint64_t* barrier, int phase, races::Scope scope) {
  pause(8);
  const races::Quiet quiet;
  BytesBarrier& b = barrier_at(cluster_rank(), shared_address(barrier));
  races::update(barrier, 8);
  wait_until("mbarrier_wait", [&b, phase] {
    if (b.phase % 2 == phase && !schedule().seeded) {
      const std::vector<Deferred> copies = std::move(b.copies);
      b.copies.clear();
      for (const auto& copy : copies) copy->finish();
    }
    return b.phase % 2 != phase;
  });
  b.done.take(scope);
  races::wait_channel(b.channel, static_cast<uint32_t>(b.phase));
}
}  // namespace emulation

inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  emulation::arrive(barrier, cluster_rank(), bytes, emulation::races::own_block);
}
inline void mbarrier_arrive(uint64_t* barrier, int rank) {
  emulation::arrive(barrier, rank, 0, emulation::races::own_block);
}
inline void mbarrier_arrive(uint64_t* barrier) { mbarrier_arrive(barrier, cluster_rank()); }
inline void mbarrier_arrive_cluster(uint64_t* barrier, int rank) {
  emulation::arrive(barrier, rank, 0, emulation::races::whole_cluster);
}
inline void mbarrier_wait(uint64_t* barrier, int phase, Site site = Site::here()) {
  if (emulation::dropped(site)) return;
  emulation::wait(barrier, phase, emulation::races::own_block);
}
inline void mbarrier_wait_cluster(uint64_t* barrier, int phase, Site site = Site::here()) {
  if (emulation::dropped(site)) return;
  emulation::wait(barrier, phase, emulation::races::whole_cluster);
}

// ---- The tensor memory accelerator ----------------------------------------------------------------------------------

struct alignas(64) TensorMap {
  const char* data = nullptr;
  int64_t row_bytes = 0;
  int rows = 0, columns = 0, box_rows = 0;
};

namespace emulation {
inline void copy_box(int rank, uint32_t to, const TensorMap& map, int row, int column, uint32_t at) {
  if (map.data == nullptr) fail("a copy with a tensor map that nobody made");
  if (to % 128 != 0) fail("a box at an address that is not aligned");
  BytesBarrier& barrier = barrier_at(rank, at);
  if (!barrier.fenced) fail("a copy that reports to an mbarrier without mbarrier_fence_init");
  char* const box = shared_at(rank, to, map.box_rows * 128);
  const uint32_t phase = static_cast<uint32_t>(barrier.phase) + 1;
  for (int r = smaller(map.box_rows, map.rows - row) - 1; r >= larger(0, -row); --r) {
    const int first = larger(0, column), last = smaller(column + box_columns, map.columns);
    if (first < last) {
      races::engine_read(map.data + (row + r) * map.row_bytes + first * 2, (last - first) * 2, barrier.channel, phase);
    }
  }
  races::engine_write(box, map.box_rows * 128, barrier.channel, phase);
  const Deferred copy = start([=, &barrier] {
    for (int r = 0; r < map.box_rows; ++r) {
      for (int c = 0; c < box_columns; ++c) {
        const bool inside = row + r >= 0 && row + r < map.rows && column + c >= 0 && column + c < map.columns;
        uint16_t x = 0;
        if (inside) std::memcpy(&x, map.data + (row + r) * map.row_bytes + (column + c) * 2, 2);
        std::memcpy(running()->shared[rank] + swizzled(to + r * 128 + c * 2), &x, 2);
      }
    }
    barrier.bytes -= map.box_rows * 128;
    end_phase_if_complete(barrier);
  });
  if (schedule().early) {
    copy->finish();
  } else if (!schedule().seeded) {
    barrier.copies.push_back(copy);
  }
}
}  // namespace emulation

// Both stand in their callers, so that a report names the kernel's line.
[[gnu::always_inline]] inline void copy_box(void* to, const TensorMap& map, int row, int column, uint64_t* barrier) {
  emulation::pause(8);
  const emulation::races::Quiet quiet;
  emulation::copy_box(cluster_rank(), shared_address(to), map, row, column, shared_address(barrier));
}
template <int BLOCKS>
[[gnu::always_inline]] inline void copy_box_to_all(void* to, const TensorMap& map, int row, int column,
                                                   uint64_t* barrier) {
  emulation::pause(8);
  const emulation::races::Quiet quiet;
  if (BLOCKS > emulation::running()->cluster) emulation::fail("more blocks than the cluster has");
  for (int rank = 0; rank < BLOCKS; ++rank) {
    emulation::copy_box(rank, shared_address(to), map, row, column, shared_address(barrier));
  }
}

inline void prefetch_map(const TensorMap& map) {
  if (map.data == nullptr) emulation::fail("a tensor map that nobody made");
}

inline void async_fence(Site site = Site::here()) {
  if (emulation::dropped(site)) return;
  emulation::races::fence_async();
}

// ---- Warpgroups -----------------------------------------------------------------------------------------------------

namespace emulation {
// A collective operation of this thread's warpgroup.
template <class Argument, class Act>
void warpgroup_meet(const char* name, Argument& argument, Act act) {
  meet(64 + thread() / 128, thread() % 128, 128, name, Orders::nothing, &argument,
       [&act](const std::vector<void*>& arguments) {
         act([&arguments](int t) -> Argument& { return *static_cast<Argument*>(arguments[t]); });
       });
}

// The numbers of a factor, [size, 16], from where its descriptor says they are: CUTLASS's canonical layouts in
// cute/atom/mma_traits_sm90_gmma.hpp, in elements of 16 bits
//
//     k-major    Swizzle<3,4,3> o ((8, m), (8, 2)) : ((64, stride), (1, 8))
//     mn-major   Swizzle<3,4,3> o ((8, 8, m), (8, k)) : ((1, 8, leading), (64, stride))
struct Factor {
  uint64_t descriptor;
  bool k_major;

  void check() const {
    if (descriptor >> 62 != 1) fail("a wgmma descriptor without 128-byte swizzle");
    if ((descriptor >> 49 & 7) != 0) fail("a wgmma descriptor with a base offset");
  }
  BARLOW_UNWATCHED uint32_t address(int i, int k) const {
    const uint32_t start = (descriptor & 0x3fff) << 4;
    const uint32_t leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
    return swizzled(k_major ? start + i % 8 * 128 + i / 8 * stride + k * 2
                            : start + i % 64 * 2 + i / 64 * leading + k % 8 * 128 + k / 8 * stride);
  }
  // Calls f(i, k, address) for numbers first .. first + size - 1, of eight neighbours, along k or along i, for the first.
  template <class F>
  void for_eights(int first, int size, F f) const {
    const int next_i = k_major ? 1 : 8, next_k = k_major ? 8 : 1;
    for (int i = first; i < first + size; i += next_i) {
      for (int k = 0; k < 16; k += next_k) f(i, k, shared_at(running()->rank(), address(i, k), 16));
    }
  }
  template <class T>
  void read(float* x, int size) const {
    for_eights(0, size, [=](int i, int k, const char* from) BARLOW_UNWATCHED {
      T numbers[8];
      std::memcpy(numbers, from, 16);
      for (int e = 0; e < 8; ++e) x[k_major ? i * 16 + k + e : (i + e) * 16 + k] = to_float(numbers[e]);
    });
  }
  void read_by_engine(int first, int size, int channel, uint32_t group) const {
    for_eights(first, size, [=](int, int, const char* from) { races::engine_read(from, 16, channel, group); });
  }
};
}  // namespace emulation

inline void wgmma_fence(Site site = Site::here()) {
  if (emulation::dropped(site)) return;
  int nothing = 0;
  emulation::warpgroup_meet("wgmma_fence", nothing, [](auto) { emulation::warpgroup().fenced = true; });
}
inline void wgmma_commit() {
  int nothing = 0;
  emulation::warpgroup_meet("wgmma_commit", nothing, [](auto) {
    emulation::Warpgroup& w = emulation::warpgroup();
    w.groups.push_back(std::move(w.products));
    w.products.clear();
    w.fenced = false;
    ++w.committed;
  });
}
template <int PENDING>
void wgmma_wait(Site site = Site::here()) {
  if (emulation::dropped(site)) return;
  int nothing = 0;
  emulation::warpgroup_meet("wgmma_wait", nothing, [](auto) {
    auto& groups = emulation::warpgroup().groups;
    while (groups.size() > PENDING) {
      for (const auto& product : groups.front()) product->finish();
      groups.erase(groups.begin());
    }
  });
  const emulation::races::Quiet quiet;
  const emulation::Warpgroup& w = emulation::warpgroup();
  if (w.committed > PENDING) emulation::races::wait_channel(w.channel, w.committed - PENDING);
}
template <int COUNT>
void pin_registers(float (&)[COUNT][4]) {}

template <class T, int N, bool A_K_MAJOR, bool B_K_MAJOR>
struct Wgmma {
  struct Thread {
    float (*d)[4];
    uint64_t a, b;
    bool add;
  };
  static void run(float (&d)[N / 8][4], uint64_t a, uint64_t b, bool add) {
    emulation::pause(8);
    tell(d, {a, A_K_MAJOR}, {b, B_K_MAJOR});
    Thread mine{d, a, b, add};
    emulation::warpgroup_meet("wgmma", mine, [](auto thread) {
      std::vector<Thread> threads;
      for (int t = 0; t < 128; ++t) {
        threads.push_back(thread(t));
        if (thread(t).a != thread(0).a || thread(t).b != thread(0).b || thread(t).add != thread(0).add) {
          emulation::fail("the threads of a warpgroup give wgmma different arguments");
        }
      }
      emulation::Warpgroup& w = emulation::warpgroup();
      if (!w.fenced) emulation::fail("wgmma without wgmma_fence before");
      const emulation::Deferred before = w.last;
      const int first = emulation::running()->current;
      w.last = emulation::start([threads, before, first] {
        if (before != nullptr) before->finish();
        multiply(threads, first);
      });
      w.products.push_back(w.last);
    });
  }

 private:
  // What a wgmma reads and whose registers it takes: each warp its 16 rows of a and all of b. One lane tells, another one
  // each time, since all must have waited.
  static void tell(float (&d)[N / 8][4], const emulation::Factor& a, const emulation::Factor& b) {
    const emulation::races::Quiet quiet;
    a.check();
    b.check();
    const emulation::Warpgroup& w = emulation::warpgroup();
    const uint32_t group = w.committed + 1;
    emulation::races::lend_registers(d, sizeof(d), w.channel, group);
    if (thread() % 32 != static_cast<int>(w.products.size() * 5 + group) % 32) return;
    a.read_by_engine(thread() % 128 / 32 * 16, 16, w.channel, group);
    b.read_by_engine(0, N, w.channel, group);
  }

  static void multiply(const std::vector<Thread>& threads, int fiber) {
    static float a[64 * 16], b[N * 16];
    emulation::Block& block = *emulation::running();
    const int before = block.current;
    block.current = fiber;  // its block's memory
    emulation::Factor{threads[0].a, A_K_MAJOR}.template read<T>(a, 64);
    emulation::Factor{threads[0].b, B_K_MAJOR}.template read<T>(b, N);
    block.current = before;
    add_product(threads.data(), a, b);
  }
  BARLOW_UNWATCHED static void add_product(const Thread* threads, const float* a, const float* b) {
    for (int m = 0; m < 64; ++m) {
      for (int n = 0; n < N; ++n) {
        double sum = 0;
        for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[m * 16 + k]) * b[n * 16 + k];
        const Thread& to = threads[m / 16 * 32 + m % 8 * 4 + n % 8 / 2];
        float& x = to.d[n / 8][m % 16 / 8 * 2 + n % 2];
        x = static_cast<float>(to.add ? x + sum : sum);
      }
    }
  }
};

template <int COUNT>
void fewer_registers() {}
template <int COUNT>
void more_registers() {}

template <int ID, int THREADS, int FIRST = 0>
void barrier_of(Site site = Site::here()) {
  if (emulation::dropped(site)) return;
  emulation::meet(96 + ID, thread() - FIRST, THREADS, "barrier_of", emulation::Orders::memory, nullptr, [](auto&) {});
}

// ---- Clusters -------------------------------------------------------------------------------------------------------

inline void cluster_barrier(Site site = Site::here()) {
  if (emulation::dropped(site)) return;
  emulation::Block& block = *emulation::running();
  emulation::meet((block.cluster - block.rank()) * emulation::Block::block_meetings, block.current,
                  block.cluster * block.threads, "cluster_barrier", emulation::Orders::memory, nullptr, [](auto&) {});
}
template <class V>
V load_from_block(const V* p, int rank) {
  const emulation::races::Quiet quiet;
  emulation::races::read(emulation::shared_at(rank, shared_address(p), sizeof(V)), sizeof(V));
  V x;
  std::memcpy(static_cast<void*>(&x), emulation::shared_at(rank, shared_address(p), sizeof(V)), sizeof(V));
  return x;
}

// ---- The host's side ------------------------------------------------------------------------------------------------

template <class What>
TensorMap tensor_map(const Matrix& m, int m_rows, int m_columns, int rows, const What& what) {
  if (!has_tensor_map(m) || m_rows < 1 || m_columns < 1 || rows < 1 || rows > 256) {
    throw std::runtime_error(what() + ": no tensor map of such a matrix");
  }
  TensorMap map;
  map.data = static_cast<const char*>(m.data);
  map.row_bytes = m.row_stride * 2;
  map.rows = m_rows;
  map.columns = m_columns;
  map.box_rows = rows;
  return map;
}

template <class Kernel>
int clusters_at_once(int) {
  (void)&Listing<Kernel, true, prepare<Kernel>>::done;
  const DeviceInfo& info = device_info(0);
  if (Kernel::shared_bytes > info.shared_bytes) return 0;
  const auto set = info.clusters.find(Kernel::cluster);
  return set != info.clusters.end() ? set->second : info.multiprocessors / Kernel::cluster;
}

template <class Kernel>
void launch_clusters(int64_t clusters, Stream, const typename Kernel::Params& params, int n, int d) {
  const auto what = [=] { return launch_name(Kernel::name, n, d); };
  const int most = clusters_at_once<Kernel>(0);
  if (most < 1) throw std::runtime_error(what() + ": no cluster fits on this device");
  const int64_t blocks = (Kernel::persistent ? smaller<int64_t>(clusters, most) : clusters) * Kernel::cluster;
  check_launch(what, n, d, blocks, Kernel::shared_bytes, device_info(0).shared_bytes);
  emulation::run_blocks(blocks, Kernel::threads, Kernel::shared_bytes, emulation::entry_of<Kernel>(params), what(),
                        Kernel::cluster);
}

}  // namespace barlow
