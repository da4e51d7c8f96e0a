// fibers.h: a block's threads on one thread of the CPU.
//
// A fiber is a stack and a place to go on from. The threads of a block are fibers that take turns: each runs until it
// has to wait for others (a barrier, a warp's collective operation) and hands over to the next. Blocks run one after
// the other, those of a cluster together. If all wait and nobody can go on, the launch fails with a sentence instead of
// hanging.
//
// Shared memory is filled with NaN first, so that a read of what nobody wrote shows. Under AddressSanitizer it is a
// heap block of exactly the size that was asked for, and every switch of stacks is announced.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace barlow::emulation {

// A group of threads that do something together: arrivals are counted, the last one does it, all go on.
struct Meeting {
  int arrived = 0;
  int64_t done = 0;              // how often it has taken place
  const char* name = "";         // of what the present one is for
  std::vector<void*> arguments;  // of each member
};

// Work that the hardware does behind the threads' back: done as late as possible, so that who does not wait sees it.
using Deferred = std::function<void()>;

struct Fiber {
  static constexpr size_t stack_bytes = 256 * 1024;
  ucontext_t context;
  jmp_buf place;
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  void* fake_stack = nullptr;
  bool started = false, ended = false;
  const char* waits_for = "";
  std::vector<Deferred> copies;               // cp.async since the last commit
  std::vector<std::vector<Deferred>> groups;  // committed, not yet waited for
};

// A cluster of blocks, mostly of one, that runs.
struct Block {
  int threads = 0, cluster = 1;  // of a block; blocks
  int block = 0, blocks = 0;     // the first one, and the grid
  int current = 0;               // fiber: its block in the cluster * threads + its thread
  std::vector<char*> shared;     // each block's
  std::vector<Fiber> fibers;
  std::vector<Meeting> meetings;  // each block's: 0 its barrier; 1 + w: warp w; 64 + g: warpgroup g; 96 + b: barrier b
  static constexpr int block_meetings = 128;
  int rank() const { return current / threads; }
  int shared_bytes = 0;
  std::shared_ptr<void> hopper;  // what emulation/hopper.h keeps
  int64_t progress = 0;          // counts whatever lets a thread go on
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
  Block& block = *running();
  Fiber& fiber = block.fibers[block.current];
  if (_setjmp(fiber.place) == 0) {
    leaving(fiber.ended ? nullptr : &fiber.fake_stack, block.scheduler_stack, block.scheduler_stack_bytes);
    _longjmp(block.scheduler, 1);
  }
  arrived(fiber.fake_stack, nullptr, nullptr);
}

[[noreturn]] inline void fail(const std::string& message) {
  Block& block = *running();
  if (block.error.empty()) block.error = "thread " + std::to_string(block.current) + ": " + message;
  for (;;) yield();
}

// Waits until `ready()`.
template <class Ready>
void wait_until(const char* what, Ready ready) {
  Fiber& fiber = running()->fibers[running()->current];
  while (!ready()) {
    fiber.waits_for = what;
    yield();
  }
  fiber.waits_for = "";
}

// Members of a meeting leave an argument; the last to arrive calls `act(arguments)`; then all go on.
template <class Act>
void meet(int meeting, int member, int members, const char* name, void* argument, Act act) {
  Block& block = *running();
  meeting += block.rank() * Block::block_meetings;
  if (meeting >= static_cast<int>(block.meetings.size())) block.meetings.resize(meeting + 1);
  Meeting* m = &block.meetings[meeting];
  if (m->arrived == 0) {
    m->name = name;
    m->arguments.assign(members, nullptr);
  } else if (std::strcmp(m->name, name) != 0) {
    fail(std::string(name) + " while others of the same group are at " + m->name);
  }
  m->arguments[member] = argument;
  if (++m->arrived == members) {
    act(m->arguments);
    m->arrived = 0;
    ++m->done;
    ++block.progress;
  } else {
    const int64_t before = m->done;
    wait_until(name, [&block, meeting, before] { return block.meetings[meeting].done != before; });
  }
}

// ---- A launch -------------------------------------------------------------------------------------------------------

inline void (*&entry_function())(const void*) {
  static void (*function)(const void*) = nullptr;
  return function;
}
inline const void*& entry_argument() {
  static const void* argument = nullptr;
  return argument;
}

inline void fiber_main() {
  arrived(nullptr, &running()->scheduler_stack, &running()->scheduler_stack_bytes);
  entry_function()(entry_argument());
  Block& block = *running();
  block.fibers[block.current].ended = true;
  ++block.progress;
  yield();
}

// Lets the fiber run until it yields.
inline void resume(Block& block, int thread) {
  Fiber& fiber = block.fibers[thread];
  block.current = thread;
  if (_setjmp(block.scheduler) == 0) {
    leaving(&block.scheduler_fake_stack, fiber.stack.get(), Fiber::stack_bytes);
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.context);
  }
  arrived(block.scheduler_fake_stack, nullptr, nullptr);
}

// The order in which threads take turns: BARLOW_EMULATION_ORDER=reverse starts with the last.
inline bool reversed() {
  const char* order = std::getenv("BARLOW_EMULATION_ORDER");
  return order != nullptr && std::strcmp(order, "reverse") == 0;
}

inline void run_blocks(int64_t blocks, int threads, int shared_bytes, void (*function)(const void*),
                       const void* argument, const std::string& what, int cluster = 1) {
  if (running() != nullptr) throw std::runtime_error(what + ": launched from within a kernel");
  entry_function() = function;
  entry_argument() = argument;
  const bool backwards = reversed();
  const int all = cluster * threads;
  std::vector<Fiber> fibers(all);
  for (int64_t b = 0; b < blocks; b += cluster) {
    Block block;
    block.threads = threads;
    block.cluster = cluster;
    block.block = static_cast<int>(b);
    block.blocks = static_cast<int>(blocks);
    const size_t bytes = (static_cast<size_t>(shared_bytes) + 1023) / 1024 * 1024;
    std::vector<std::unique_ptr<char, void (*)(void*)>> shared;
    for (int rank = 0; rank < cluster; ++rank) {
      shared.emplace_back(static_cast<char*>(std::aligned_alloc(1024, bytes ? bytes : 1024)), std::free);
      std::memset(shared.back().get(), 0xff, bytes);
      block.shared.push_back(shared.back().get());
    }
    block.shared_bytes = shared_bytes;
    block.fibers.swap(fibers);
    for (Fiber& fiber : block.fibers) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = Fiber::stack_bytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, fiber_main, 0);
      fiber.started = fiber.ended = false;
      fiber.fake_stack = nullptr;
      fiber.copies.clear();
      fiber.groups.clear();
    }
    running() = &block;
    for (bool alive = true; alive && block.error.empty();) {
      const int64_t before = block.progress;
      alive = false;
      for (int i = 0; i < all && block.error.empty(); ++i) {
        const int thread = backwards ? all - 1 - i : i;
        if (block.fibers[thread].ended) continue;
        resume(block, thread);
        alive |= !block.fibers[thread].ended;
      }
      if (alive && block.progress == before && block.error.empty()) {
        block.error = "no thread can go on:";
        for (int i = 0; i < all; ++i) {
          if (!block.fibers[i].ended) {
            block.error += " thread " + std::to_string(i) + " waits at " + block.fibers[i].waits_for;
            break;
          }
        }
      }
    }
    running() = nullptr;
    block.fibers.swap(fibers);
    if (!block.error.empty()) throw std::runtime_error(what + ": block " + std::to_string(b) + ": " + block.error);
  }
}

}  // namespace barlow::emulation
