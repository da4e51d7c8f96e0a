// fibers.h: a grid's threads on one thread of the CPU.
//
// A fiber is a stack and a place to go on from. The threads of a block are fibers that take turns: each runs until it
// has to wait for others (a barrier, a warp's collective operation) and hands over to the next, in an order that
// schedule.h gives. Clusters run one after the other or several at once. If all threads of a cluster wait and nobody can
// go on, the launch fails with a sentence instead of hanging.
//
// Shared memory is filled with NaN first, so that a read of what nobody wrote shows. Under AddressSanitizer it is a
// heap block of exactly the size that was asked for, and every switch of stacks is announced. races.h learns who runs.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "races.h"
#include "schedule.h"
#include "sites.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

// Of functions that are called often and touch nothing of a kernel's.
#ifdef BARLOW_RACES
#define BARLOW_UNWATCHED __attribute__((no_sanitize("thread")))
#else
#define BARLOW_UNWATCHED
#endif

namespace barlow::emulation {

// A group of threads that do something together: arrivals are counted, the last one does it, all go on.
struct Meeting {
  int arrived = 0;
  int64_t done = 0;              // how often it has taken place
  const char* name = "";         // of what the present one is for
  std::vector<void*> arguments;  // of each member
  std::vector<int> members;      // their fibers, as they come
};

// Work that the hardware does behind the threads' back, once: somewhere between its issue and the wait for it.
struct Work {
  std::function<void()> run;
  bool done = false;

  void finish() {
    if (done) return;
    done = true;
    const races::Quiet quiet;
    run();
  }
};
using Deferred = std::shared_ptr<Work>;

struct Fiber {
  static constexpr size_t stack_bytes = 256 * 1024;
  ucontext_t context;
  jmp_buf place;
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  void* fake_stack = nullptr;
  bool started = false, ended = false;
  const char* waits_for = "";
  bool (*is_ready)(void*) = nullptr;  // what it waits for, asked without switching to it
  void* ready = nullptr;
  std::vector<Deferred> copies;               // cp.async since the last commit
  std::vector<std::vector<Deferred>> groups;  // committed, not yet waited for
};

// A cluster of blocks, mostly of one, that runs.
struct Block {
  int threads = 0, cluster = 1;  // of a block; blocks
  int block = 0, blocks = 0;     // the first one, and the grid
  int current = 0;               // fiber: its block in the cluster * threads + its thread
  bool in_fiber = false;         // else the scheduler does some work
  std::vector<char*> shared;     // each block's
  std::vector<std::unique_ptr<char, void (*)(void*)>> memory;
  std::vector<Fiber> fibers;
  std::vector<int> alive;         // threads of each block that have not ended
  std::vector<Meeting> meetings;  // each block's: 0 its barrier; 1 + w: warp w; 64 + g: warpgroup g; 96 + b: barrier b
  static constexpr int block_meetings = 128;
  int rank() const { return current / threads; }
  int shared_bytes = 0;
  std::vector<Deferred> under_way;  // what may end at any time, where the order is random
  std::shared_ptr<void> hopper;     // what emulation/hopper.h keeps
  int64_t progress = 0;             // counts whatever lets a thread go on
  std::string error;
  jmp_buf scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
};

inline Block*& running() {
  static Block* block = nullptr;
  return block;
}

// ---- Switching ------------------------------------------------------------------------------------------------------

#ifdef __SANITIZE_ADDRESS__
inline void leaving(void** fake_stack, const void* to, size_t bytes) {
  __sanitizer_start_switch_fiber(fake_stack, to, bytes);
}
inline void arrived(void* fake_stack, const void** from, size_t* bytes) {
  __sanitizer_finish_switch_fiber(fake_stack, from, bytes);
}
#else
inline void leaving(void**, const void*, size_t) {}
inline void arrived(void*, const void**, size_t*) {}
#endif

// From a thread back to the scheduler, which takes the next.
inline void yield() {
  const races::Quiet quiet;
  Block& block = *running();
  Fiber& fiber = block.fibers[block.current];
  if (_setjmp(fiber.place) == 0) {
    leaving(fiber.ended ? nullptr : &fiber.fake_stack, block.scheduler_stack, block.scheduler_stack_bytes);
    _longjmp(block.scheduler, 1);
  }
  arrived(fiber.fake_stack, nullptr, nullptr);
}

// Sometimes, where the order is random: before something that others see.
inline void pause(uint32_t one_in) {
  const races::Quiet quiet;
  if (!schedule().chance(one_in)) return;
  ++running()->progress;  // nobody waits
  yield();
}

[[noreturn]] inline void fail(const std::string& message) {
  Block& block = *running();
  if (!block.in_fiber) throw std::runtime_error(message);
  if (block.error.empty()) block.error = "thread " + std::to_string(block.current) + ": " + message;
  for (;;) yield();
}

// Waits until `ready()`.
template <class Ready>
void wait_until(const char* what, Ready ready) {
  const races::Quiet quiet;
  if (ready()) return;
  Fiber& fiber = running()->fibers[running()->current];
  fiber.waits_for = what;
  fiber.is_ready = [](void* asked) { return (*static_cast<Ready*>(asked))(); };
  fiber.ready = &ready;
  yield();
  fiber.is_ready = nullptr;
}

// Whether a meeting orders what its members do before and after it.
enum class Orders { nothing, memory };

// Members of a meeting leave an argument; the last to arrive calls `act(arguments)`; then all go on.
template <class Act>
void meet(int meeting, int member, int members, const char* name, Orders orders, void* argument, Act act) {
  const races::Quiet quiet;
  Block& block = *running();
  meeting += block.rank() * Block::block_meetings;
  if (meeting >= static_cast<int>(block.meetings.size())) block.meetings.resize(meeting + 1);
  Meeting* m = &block.meetings[meeting];
  if (m->arrived == 0) {
    m->name = name;
    m->arguments.assign(members, nullptr);
    m->members.clear();
  } else if (std::strcmp(m->name, name) != 0) {
    fail(std::string(name) + " while others of the same group are at " + m->name);
  }
  m->arguments[member] = argument;
  m->members.push_back(block.current);
  if (++m->arrived == members) {
    if (orders == Orders::memory) races::meet(m->members);
    act(m->arguments);
    m->arrived = 0;
    ++m->done;
    ++block.progress;
  } else {
    const int64_t before = m->done;
    wait_until(name, [&block, meeting, before] { return block.meetings[meeting].done != before; });
  }
}

// ---- What runs by itself --------------------------------------------------------------------------------------------

// Starts it. Where the order is random it may end from here on, else when finish() is called.
inline Deferred start(std::function<void()> run) {
  auto work = std::make_shared<Work>();
  work->run = std::move(run);
  if (schedule().seeded) running()->under_way.push_back(work);
  return work;
}

// Lets something end. False: nothing was under way.
inline bool finish_some(Block& block) {
  while (!block.under_way.empty()) {
    std::swap(block.under_way[schedule().random(static_cast<uint32_t>(block.under_way.size()))],
              block.under_way.back());
    const Deferred work = std::move(block.under_way.back());
    block.under_way.pop_back();
    if (work->done) continue;
    ++block.progress;
    work->finish();
    return true;
  }
  return false;
}

// ---- A launch -------------------------------------------------------------------------------------------------------

struct Entry {
  void (*function)(const void*) = nullptr;
  const void* argument = nullptr;
  size_t argument_bytes = 0;
};
inline Entry& entry() {
  static Entry entry;
  return entry;
}

inline void fiber_main() {
  arrived(nullptr, &running()->scheduler_stack, &running()->scheduler_stack_bytes);
  entry().function(entry().argument);
  const races::Quiet quiet;
  Block& block = *running();
  block.fibers[block.current].ended = true;
  if (--block.alive[block.rank()] == 0) races::end_block(block.block / block.cluster, block.rank());
  ++block.progress;
  yield();
}

// Lets the fiber run until it yields.
inline void resume(Block& block, int thread) {
  Fiber& fiber = block.fibers[thread];
  block.current = thread;
  block.in_fiber = true;
  running() = &block;
  if (_setjmp(block.scheduler) == 0) {
    leaving(&block.scheduler_fake_stack, fiber.stack.get(), Fiber::stack_bytes);
    const bool fresh = !fiber.started;
    fiber.started = true;
    races::enter(block.block / block.cluster, thread, fiber.stack.get(), Fiber::stack_bytes, fresh);
    if (!fresh) _longjmp(fiber.place, 1);
    setcontext(&fiber.context);
  }
  races::leave();
  arrived(block.scheduler_fake_stack, nullptr, nullptr);
  block.in_fiber = false;
}

inline std::unique_ptr<Block> begin_cluster(int64_t first, int64_t blocks, int threads, int cluster, int shared_bytes,
                                            std::vector<std::vector<Fiber>>& spare) {
  auto made = std::make_unique<Block>();
  Block& block = *made;
  block.threads = threads;
  block.cluster = cluster;
  block.block = static_cast<int>(first);
  block.blocks = static_cast<int>(blocks);
  block.shared_bytes = shared_bytes;
  block.alive.assign(cluster, threads);
  const int number = block.block / cluster;
  races::begin_cluster(number, cluster, threads);
  const size_t bytes = (static_cast<size_t>(shared_bytes) + 1023) / 1024 * 1024;
  for (int rank = 0; rank < cluster; ++rank) {
    block.memory.emplace_back(static_cast<char*>(std::aligned_alloc(1024, bytes ? bytes : 1024)), std::free);
    block.shared.push_back(block.memory.back().get());
    std::memset(block.shared.back(), 0xff, bytes);
    races::begin_block(number, rank, block.shared.back(), bytes);
  }
  if (spare.empty()) spare.emplace_back(static_cast<size_t>(cluster) * threads);
  block.fibers = std::move(spare.back());
  spare.pop_back();
  for (Fiber& fiber : block.fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::stack_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
    fiber.started = fiber.ended = false;
    fiber.is_ready = nullptr;
    fiber.fake_stack = nullptr;
    fiber.copies.clear();
    fiber.groups.clear();
  }
  return made;
}

// Lets the fiber run if it can.
inline void resume_if_ready(Block& block, int thread) {
  Fiber& fiber = block.fibers[thread];
  block.current = thread;
  if (fiber.is_ready == nullptr || fiber.is_ready(fiber.ready)) resume(block, thread);
}

// One turn of a cluster's threads. Returns whether any is left.
inline bool take_turns(Block& block) {
  Schedule& s = schedule();
  const int all = static_cast<int>(block.fibers.size()), warps = (all + 31) / 32;
  const int64_t before = block.progress;
  bool alive = false, skipped = false;
  const bool skips = s.chance(2);
  std::vector<int> order(warps);  // of warps
  std::iota(order.begin(), order.end(), 0);
  if (s.reversed) std::reverse(order.begin(), order.end());
  if (s.seeded) {
    for (int w = warps - 1; w > 0; --w) std::swap(order[w], order[s.random(w + 1)]);
  }
  for (const int w : order) {
    if (skips && s.random(4) == 0) {  // this warp falls behind
      skipped = true;
      continue;
    }
    const bool backwards = s.seeded ? s.chance(2) : s.reversed;
    const int begin = w * 32, end = std::min(all, begin + 32);
    for (int i = begin; i < end && block.error.empty(); ++i) {
      const int thread = backwards ? begin + end - 1 - i : i;
      if (block.fibers[thread].ended) continue;
      resume_if_ready(block, thread);
      alive |= !block.fibers[thread].ended;
    }
    if (s.chance(8) && block.error.empty()) finish_some(block);
    if (!block.error.empty()) return false;
  }
  if (skipped) return true;
  if (alive && block.progress == before && !finish_some(block) && block.error.empty()) {
    for (int i = 0; i < all && block.error.empty(); ++i) {
      if (!block.fibers[i].ended) {
        block.error = "no thread can go on: thread " + std::to_string(i) + " waits at " + block.fibers[i].waits_for;
      }
    }
  }
  return alive && block.error.empty();
}

constexpr int most_fibers = 6144;  // that are alive at once, but always one cluster

inline void run_blocks(int64_t blocks, int threads, int shared_bytes, const Entry& what_to_run, const std::string& what,
                       int cluster = 1) {
  if (running() != nullptr) throw std::runtime_error(what + ": launched from within a kernel");
  entry() = what_to_run;
  Schedule& s = schedule();
  s.read(what);
  drop().read();
  races::begin_launch(what_to_run.argument, what_to_run.argument_bytes, s.seed);
  const int64_t clusters = blocks / cluster;
  const size_t at_once = s.seeded ? std::max(1, most_fibers / (cluster * threads)) : 1;
  std::vector<int64_t> left(clusters);  // to begin, the next one last
  std::iota(left.rbegin(), left.rend(), 0);
  if (s.seeded) {
    for (int64_t i = clusters - 1; i > 0; --i) std::swap(left[i], left[s.random(static_cast<uint32_t>(i + 1))]);
  }
  std::vector<std::unique_ptr<Block>> alive;
  std::vector<std::vector<Fiber>> spare;
  std::string error;
  while (error.empty() && (!left.empty() || !alive.empty())) {
    if (!left.empty() && alive.size() < at_once) {
      alive.push_back(begin_cluster(left.back() * cluster, blocks, threads, cluster, shared_bytes, spare));
      left.pop_back();
    }
    const size_t i = s.seeded ? s.random(static_cast<uint32_t>(alive.size())) : 0;
    Block& block = *alive[i];
    running() = &block;
    try {
      if (take_turns(block)) continue;
    } catch (const std::runtime_error& failure) {  // of what runs by itself
      block.error = failure.what();
    }
    if (!block.error.empty()) error = "block " + std::to_string(block.block) + ": " + block.error;
    races::end_cluster(block.block / cluster);
    spare.push_back(std::move(block.fibers));
    alive.erase(alive.begin() + static_cast<std::ptrdiff_t>(i));
  }
  running() = nullptr;
  const std::string found = races::end_launch();
  if (!error.empty()) throw std::runtime_error(what + ": " + error + (found.empty() ? "" : "\n" + found));
  if (!found.empty()) throw std::runtime_error(what + ": " + found);
}

}  // namespace barlow::emulation
