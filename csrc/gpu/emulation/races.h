// races.h: which accesses are ordered, whatever the order in which the emulation happens to run them.
//
// With BARLOW_SANITIZE=thread the compiler reports every access of the kernels to races.cpp (-fsanitize=thread; the
// calls that would go to ThreadSanitizer's own library end there). The primitives report what they order. Two accesses
// of different threads to the same bytes, one of them a write, that nothing orders are a race, and the launch fails
// with both places. README.md has the model.
//
// Without BARLOW_RACES all of this is empty.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace barlow::emulation::races {

#ifdef BARLOW_RACES

// ---- A launch and who runs ------------------------------------------------------------------------------------------

void watch(bool on);  // false: launches that begin from now on are not looked at
void begin_launch(const void* parameters, size_t bytes, uint64_t seed);
std::string end_launch();  // the races that were found, or nothing

// Clusters are counted in the grid, a cluster's threads over its blocks.
void begin_cluster(int cluster, int blocks, int threads);
void begin_block(int cluster, int rank, const char* shared, size_t bytes);  // fresh shared memory
void end_block(int cluster, int rank);  // nobody may touch its shared memory from here on, nor have unordered before
void end_cluster(int cluster);

// `thread` of a cluster runs until leave(); not `fresh`: it goes on within the emulation.
void enter(int cluster, int thread, const char* stack, size_t bytes, bool fresh);
void leave();

// The emulation's own work is nobody's access.
class Quiet {
 public:
  Quiet();
  ~Quiet();
  Quiet(const Quiet&) = delete;

 private:
  bool before_;
};

// ---- Accesses that the compiler does not see, by the running thread -------------------------------------------------

void read(const void* p, size_t bytes);
void write(const void* p, size_t bytes);
void update(const void* p, size_t bytes);  // atomic

// ---- What orders ----------------------------------------------------------------------------------------------------

// All of these threads of the running cluster meet.
void meet(const std::vector<int>& threads);

struct Clock;
enum Scope { own_block, whole_cluster };

// What threads leave for others at a barrier in shared memory.
class Mailbox {
 public:
  Mailbox();
  void leave(Scope scope, bool remote);  // by the running thread; remote: another block's
  void take(Scope scope) const;          // by the running thread

 private:
  std::shared_ptr<Clock> near_, far_;  // of this block, and of others with scope whole_cluster
};

// A ticket from a counter in global memory, drawn by a relaxed atomic: what this thread knew at its last fence is known
// to who draws a later ticket, after the next fence there.
void ticket(const void* counter);
void fence_device();

// What is ordered before this thread's fence is visible to the async proxy.
void fence_async();

// ---- What runs by itself --------------------------------------------------------------------------------------------

// cp.async: a thread's copies come in groups that end in order.
void copy(const void* to, const void* from, size_t bytes);
void commit_copies();
void wait_copies(int pending);

// TMA and wgmma. A channel's accesses are numbered by groups; who waits for a group waits for all before it.
int new_channel();  // of the running cluster
void engine_read(const void* p, size_t bytes, int channel, uint32_t group);
void engine_write(const void* p, size_t bytes, int channel, uint32_t group);
void wait_channel(int channel, uint32_t group);  // by the running thread

// The accumulators of a wgmma on the running thread's stack, until it has waited for the group.
void lend_registers(const void* p, size_t bytes, int channel, uint32_t group);

#else

inline void watch(bool) {}
inline void begin_launch(const void*, size_t, uint64_t) {}
inline std::string end_launch() { return ""; }
inline void begin_cluster(int, int, int) {}
inline void begin_block(int, int, const char*, size_t) {}
inline void end_block(int, int) {}
inline void end_cluster(int) {}
inline void enter(int, int, const char*, size_t, bool) {}
inline void leave() {}
class Quiet {
 public:
  Quiet() {}
};
inline void read(const void*, size_t) {}
inline void write(const void*, size_t) {}
inline void update(const void*, size_t) {}
inline void meet(const std::vector<int>&) {}
enum Scope { own_block, whole_cluster };
class Mailbox {
 public:
  void leave(Scope, bool) {}
  void take(Scope) const {}
};
inline void ticket(const void*) {}
inline void fence_device() {}
inline void fence_async() {}
inline void copy(const void*, const void*, size_t) {}
inline void commit_copies() {}
inline void wait_copies(int) {}
inline int new_channel() { return 0; }
inline void engine_read(const void*, size_t, int, uint32_t) {}
inline void engine_write(const void*, size_t, int, uint32_t) {}
inline void wait_channel(int, uint32_t) {}
inline void lend_registers(const void*, size_t, int, uint32_t) {}

#endif

}  // namespace barlow::emulation::races
