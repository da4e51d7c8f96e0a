// What the race detector of the emulation takes for ordered, one small kernel a rule, right and wrong.
// `race_model NAME right|wrong` prints what the launch says; without arguments, the names. test_races.py runs it.
#include <cstdio>
#include <cstring>
#include <string>

#include "gpu/hopper.h"

using namespace barlow;

namespace {

struct Params {
  float* x;  // 4096 numbers of global memory
  int* counter;
  TensorMap map;  // of 64 x 64 halves
  bool right;
};

// The compiler must not leave out the reading of a number that nobody needs.
inline void use(float x) { asm volatile("" ::"x"(x)); }
inline float* shared() { return reinterpret_cast<float*>(shared_memory()); }

struct Small {
  using Params = ::Params;
  static constexpr int threads = 64, blocks = 1, cluster = 1, shared_bytes = 1024;
};

struct Barrier : Small {
  static constexpr const char* name = "barrier";
  static void run(const Params& p) {
    shared()[thread()] = 1.f;
    if (p.right) barrier();
    use(shared()[63 - thread()]);
  }
};

struct WarpBarrier : Small {
  static constexpr const char* name = "warp_barrier";
  static void run(const Params& p) {
    shared()[thread()] = 1.f;
    if (p.right) warp_barrier();
    use(shared()[thread() ^ 1]);
  }
};

// A warp's barrier does not reach another warp.
struct OtherWarp : Small {
  static constexpr const char* name = "other_warp";
  static void run(const Params& p) {
    shared()[thread()] = 1.f;
    warp_barrier();
    use(shared()[p.right ? thread() ^ 1 : thread() ^ 32]);
  }
};

// Values that go from lane to lane order nothing.
struct Shuffle : Small {
  static constexpr const char* name = "shuffle";
  static void run(const Params& p) {
    shared()[thread()] = 1.f;
    use(shuffle_xor(1.f, 1));
    if (p.right) warp_barrier();
    use(shared()[thread() ^ 1]);
  }
};

struct Named : Small {
  static constexpr const char* name = "barrier_of";
  static constexpr int threads = 96;
  static void run(const Params& p) {
    shared()[thread()] = 1.f;
    if (thread() >= 64) return;
    barrier_of<1, 64>();
    use(shared()[p.right ? 63 - thread() : 64]);  // the third warp was not there
  }
};

struct Neighbours : Small {  // halves of one word are no race
  static constexpr const char* name = "neighbours";
  static void run(const Params& p) {
    reinterpret_cast<uint16_t*>(shared_memory())[p.right ? thread() : thread() / 2] = static_cast<uint16_t>(thread());
  }
};

struct Blocks : Small {
  static constexpr const char* name = "blocks";
  static constexpr int blocks = 3;
  static void run(const Params& p) { p.x[p.right ? block_id() * threads + thread() : thread()] = 1.f; }
};

// Every block leaves a number and draws a ticket, the last adds.
template <class Kernel>
void add_in_turn(const Params& p, bool barrier_before, bool fence_before, bool fence_after) {
  p.x[block_id() * Kernel::threads + thread()] = 1.f;
  if (barrier_before) barrier();
  if (thread() == 0) {
    if (fence_before) fence_device();
    shared()[0] = static_cast<float>(draw_ticket(p.counter));
    if (fence_after) fence_device();
  }
  barrier();
  if (shared()[0] != Kernel::blocks - 1) return;
  for (int b = 0; b < Kernel::blocks; ++b) use(p.x[b * Kernel::threads + 63 - thread()]);
}
struct Ticket : Small {  // one thread's ticket does not speak for the others
  static constexpr const char* name = "ticket";
  static constexpr int blocks = 3;
  static void run(const Params& p) { add_in_turn<Ticket>(p, p.right, true, true); }
};
struct Release : Small {
  static constexpr const char* name = "release";
  static constexpr int blocks = 3;
  static void run(const Params& p) { add_in_turn<Release>(p, true, p.right, true); }
};
struct Acquire : Small {
  static constexpr const char* name = "acquire";
  static constexpr int blocks = 3;
  static void run(const Params& p) { add_in_turn<Acquire>(p, true, true, p.right); }
};

struct PlainCounter : Small {
  static constexpr const char* name = "plain_counter";
  static constexpr int blocks = 2;
  static void run(const Params& p) {
    if (thread() != 0) return;
    if (p.right || block_id() == 0) {
      draw_ticket(p.counter);
    } else {
      ++*p.counter;
    }
  }
};

struct CopyAsync : Small {
  static constexpr const char* name = "copy_async";
  static void run(const Params& p) {
    copy_async(shared_memory() + thread() * 16, p.x + thread() * 4, 16);
    copy_async_commit();
    if (p.right) copy_async_wait<0>();
    use(shared()[thread() * 4]);
  }
};

// Who waits, waits for its own copies.
struct OthersCopies : Small {
  static constexpr const char* name = "others_copies";
  static void run(const Params& p) {
    copy_async(shared_memory() + thread() * 16, p.x + thread() * 4, 16);
    copy_async_commit();
    if (p.right) {
      copy_async_wait<0>();
      barrier();
    } else {
      barrier();
      copy_async_wait<0>();
    }
    use(shared()[(63 - thread()) * 4]);
  }
};

struct Tma : Small {
  static constexpr const char* name = "tma";
  static constexpr int shared_bytes = 8192 + 64;
  static void run(const Params& p) {
    uint64_t* const full = reinterpret_cast<uint64_t*>(shared_memory() + 8192);
    if (thread() == 0) {
      mbarrier_init(full, 1);
      mbarrier_fence_init();
    }
    barrier();
    if (thread() == 0) {
      mbarrier_arrive_expect(full, 8192);
      copy_box(shared_memory(), p.map, 0, 0, full);
    }
    if (p.right || thread() != 5) mbarrier_wait(full, 0);
    use(shared()[thread()]);
  }
};

struct InitFence : Small {
  static constexpr const char* name = "init_fence";
  static constexpr int shared_bytes = 8192 + 64;
  static void run(const Params& p) {
    uint64_t* const full = reinterpret_cast<uint64_t*>(shared_memory() + 8192);
    if (thread() == 0) {
      mbarrier_init(full, 1);
      if (p.right) mbarrier_fence_init();
      mbarrier_arrive_expect(full, 8192);
      copy_box(shared_memory(), p.map, 0, 0, full);
      mbarrier_wait(full, 0);
    }
  }
};

// The TMA overwrites what threads wrote: fence.proxy.async before the barrier.
struct ProxyFence : Small {
  static constexpr const char* name = "proxy_fence";
  static constexpr int shared_bytes = 8192 + 64;
  static void run(const Params& p) {
    uint64_t* const full = reinterpret_cast<uint64_t*>(shared_memory() + 8192);
    if (thread() == 0) {
      mbarrier_init(full, 1);
      mbarrier_fence_init();
    }
    shared()[thread()] = 1.f;
    if (p.right) async_fence();
    barrier();
    if (thread() == 0) {
      mbarrier_arrive_expect(full, 8192);
      copy_box(shared_memory(), p.map, 0, 0, full);
    }
    mbarrier_wait(full, 0);
  }
};

// It may overwrite what they only read, when they are done.
struct ReadThenCopied : Small {
  static constexpr const char* name = "read_then_copied";
  static constexpr int shared_bytes = 8192 + 64;
  static void run(const Params& p) {
    uint64_t* const full = reinterpret_cast<uint64_t*>(shared_memory() + 8192);
    if (thread() == 0) {
      mbarrier_init(full, 1);
      mbarrier_fence_init();
    }
    barrier();
    use(shared()[thread()]);
    if (p.right) barrier();
    if (thread() == 0) {
      mbarrier_arrive_expect(full, 8192);
      copy_box(shared_memory(), p.map, 0, 0, full);
    }
    mbarrier_wait(full, 0);
  }
};

// wgmma reads and its accumulators change until it has been waited for.
struct Accumulators : Small {
  static constexpr const char* name = "accumulators";
  static constexpr int threads = 128, shared_bytes = 8192 + 32768;
  static void run(const Params& p) {
    for (int i = thread(); i < shared_bytes / 4; i += threads) shared()[i] = 0.f;
    async_fence();
    barrier();
    float d[32][4];
    wgmma_fence();
    Wgmma<bfloat16, 256, true, true>::run(d, wgmma_descriptor<true, 8192>(shared_address(shared_memory())),
                                          wgmma_descriptor<true, 8192>(shared_address(shared_memory() + 8192)), false);
    wgmma_commit();
    if (p.right) wgmma_wait<0>();
    use(d[0][0]);
    wgmma_wait<0>();
  }
};

struct Factors : Small {
  static constexpr const char* name = "factors";
  static constexpr int threads = 128, shared_bytes = 8192 + 32768;
  static void run(const Params& p) {
    for (int i = thread(); i < shared_bytes / 4; i += threads) shared()[i] = 0.f;
    if (p.right) async_fence();
    barrier();
    float d[32][4];
    wgmma_fence();
    Wgmma<bfloat16, 256, true, true>::run(d, wgmma_descriptor<true, 8192>(shared_address(shared_memory())),
                                          wgmma_descriptor<true, 8192>(shared_address(shared_memory() + 8192)), false);
    wgmma_commit();
    wgmma_wait<0>();
  }
};

struct Cluster : Small {
  static constexpr const char* name = "cluster";
  static constexpr int cluster = 2, blocks = 2;
  static void run(const Params& p) {
    shared()[thread()] = 1.f;
    if (p.right) {
      cluster_barrier();
    } else {
      barrier();
    }
    use(load_from_block(shared() + thread(), 1 - cluster_rank()));
    cluster_barrier();
  }
};

// A block must not end while another reads its shared memory.
struct EarlyEnd : Small {
  static constexpr const char* name = "early_end";
  static constexpr int cluster = 2, blocks = 2;
  static void run(const Params& p) {
    shared()[thread()] = 1.f;
    cluster_barrier();
    use(load_from_block(shared() + thread(), 1 - cluster_rank()));
    if (p.right) cluster_barrier();
  }
};

// What another block wrote is visible after an arrival and a wait whose scope is the cluster.
struct ClusterScope : Small {
  static constexpr const char* name = "cluster_scope";
  static constexpr int cluster = 2, blocks = 2;
  static void run(const Params& p) {
    uint64_t* const there = reinterpret_cast<uint64_t*>(shared_memory() + 512);
    if (thread() == 0) {
      mbarrier_init(there, threads);
      mbarrier_fence_init();
    }
    cluster_barrier();
    shared()[thread()] = 1.f;
    const int other = 1 - cluster_rank();
    if (p.right) {
      mbarrier_arrive_cluster(there, other);
      mbarrier_wait_cluster(there, 0);
    } else {
      mbarrier_arrive(there, other);
      mbarrier_wait(there, 0);
    }
    use(load_from_block(shared() + 63 - thread(), other));
    cluster_barrier();
  }
};

// The end of a launch orders everything: `launches` of them write the same memory.
struct Launches : Small {
  static constexpr const char* name = "launches";
  static constexpr int blocks = 2;
  static void run(const Params& p) {
    if (p.right && block_id() == 1) return;
    p.x[thread()] = 1.f;
  }
};

template <class Kernel>
bool is(const std::string& name, bool right) {
  if (name.empty()) {
    std::printf("%s\n", Kernel::name);
    return false;
  }
  if (name != Kernel::name) return false;
  alignas(64) static float x[4096];
  alignas(64) static uint16_t halves[64 * 64];
  static int counter;
  Params p{x, &counter, {}, right};
  p.map = tensor_map(Matrix{halves, 64, 1, DType::bfloat16}, 64, 64, 64, [] { return std::string("map"); });
  for (int i = 0; i < 2; ++i) {
    counter = 0;
    emulation::run_blocks(Kernel::blocks, Kernel::threads, Kernel::shared_bytes, emulation::entry_of<Kernel>(p), "",
                          Kernel::cluster);
  }
  return true;
}

template <class... Kernels>
bool any_is(const std::string& name, bool right) {
  return (is<Kernels>(name, right) || ...);
}

}  // namespace

int main(int count, char** arguments) {
  const std::string name = count > 1 ? arguments[1] : "";
  const bool right = count > 2 && std::strcmp(arguments[2], "right") == 0;
  try {
    const bool found =
        any_is<Barrier, WarpBarrier, OtherWarp, Shuffle, Named, Neighbours, Blocks, Ticket, Release, Acquire,
               PlainCounter, CopyAsync, OthersCopies, Tma, InitFence, ProxyFence, ReadThenCopied, Accumulators, Factors,
               Cluster, EarlyEnd, ClusterScope, Launches>(name, right);
    return found || name.empty() ? 0 : 2;
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}
