// races.cpp: the accesses of a launch, and what orders them. Itself compiled without -fsanitize=thread.
//
// Vector clocks (FastTrack): every thread counts epochs; where threads meet they learn of one another how far each had
// come. An access is remembered with its thread and epoch, and a later one of another thread asks whether its own clock
// has come to know of it. A clock is an array over the threads of a cluster, shared by all who know the same, and a list
// of such arrays of other clusters, which tickets hand over.
#include "races.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <set>
#include <unordered_map>

namespace barlow::emulation::races {

namespace {

bool watching = false, in_thread = false;

// ---- Clocks ---------------------------------------------------------------------------------------------------------

using Epochs = std::vector<uint32_t>;
using Row = std::shared_ptr<const Epochs>;  // of a cluster's actors
using Rows = std::map<int, Row>;            // by cluster
}  // namespace

// What README.md calls the three orders: what is over, what is visible to the generic proxy, and what to the async one.
enum Order { over, visible, fenced };
constexpr Order orders[] = {over, visible, fenced};

struct Clock {
  struct One {
    Row own;
    std::shared_ptr<const Rows> others;
  } of[3];
};

namespace {

// The larger of each; the very same row where one holds the other. Those who learn the same share the result.
Row join(const Row& a, const Row& b) {
  if (a == b || b == nullptr) return a;
  if (a == nullptr) return b;
  struct Known {
    Row a, b, both;
  };
  static std::vector<Known> known(256);
  const size_t hash = (reinterpret_cast<uintptr_t>(a.get()) >> 4) * 31 + (reinterpret_cast<uintptr_t>(b.get()) >> 4);
  Known& k = known[hash % known.size()];
  if (k.a == a && k.b == b) return k.both;
  const size_t size = std::min(a->size(), b->size());
  bool a_holds = a->size() >= b->size(), b_holds = b->size() >= a->size();
  for (size_t i = 0; i < size; ++i) {
    a_holds &= (*a)[i] >= (*b)[i];
    b_holds &= (*b)[i] >= (*a)[i];
  }
  Row both = a_holds ? a : b_holds ? b : nullptr;
  if (both == nullptr) {
    auto made = std::make_shared<Epochs>(a->size() >= b->size() ? *a : *b);
    const Epochs& less = a->size() >= b->size() ? *b : *a;
    for (size_t i = 0; i < size; ++i) (*made)[i] = std::max((*made)[i], less[i]);
    both = std::move(made);
  }
  k = {a, b, both};
  return both;
}

std::shared_ptr<const Rows> join(const std::shared_ptr<const Rows>& a, const std::shared_ptr<const Rows>& b) {
  if (a == b || b == nullptr) return a;
  if (a == nullptr) return b;
  static std::shared_ptr<const Rows> known_a, known_b, both;
  if (known_a == a && known_b == b) return both;
  auto made = std::make_shared<Rows>(*a);
  bool same = true;
  for (const auto& [cluster, row] : *b) {
    Row& mine = (*made)[cluster];
    Row joined = join(mine, row);
    same &= joined == mine;
    mine = std::move(joined);
  }
  known_a = a;
  known_b = b;
  both = same ? a : std::shared_ptr<const Rows>(std::move(made));
  return both;
}

void learn(Clock::One& to, const Clock::One& from) {
  to.own = join(to.own, from.own);
  to.others = join(to.others, from.others);
}

uint32_t at(const Row& row, size_t index) { return row != nullptr && index < row->size() ? (*row)[index] : 0; }

void raise(Epochs& row, size_t index, uint32_t epoch) {
  if (epoch == 0) return;
  if (row.size() <= index) row.resize(index + 1);
  row[index] = std::max(row[index], epoch);
}

// ---- Threads --------------------------------------------------------------------------------------------------------

struct Registers {
  uintptr_t begin, end;
  int channel;
  uint32_t group;
};

// A thread's clock leaves out what it knows of itself.
struct Thread {
  Clock clock;
  Clock at_fence, drawn;  // what its tickets hand on, and what they have brought that its next fence makes known
  uint32_t epoch = 1, fenced_epoch = 0;
  uint32_t copier = 0;                                      // the channel of its cp.async, when there is any
  uint32_t copies = 0, copies_done = 0, copies_fenced = 0;  // groups of cp.async
  std::vector<Registers> lent;
  static constexpr int most_callers = 32;
  const void* callers[most_callers];  // where the functions that it is in were called
  int depth = 0;

  std::vector<const void*> places(const void* pc) const {  // the innermost first
    std::vector<const void*> all(1, pc);
    for (int i = std::min(depth, most_callers); i > 0; --i) all.push_back(callers[i - 1]);
    return all;
  }
  const void* caller() const { return depth > 0 && depth <= most_callers ? callers[depth - 1] : nullptr; }
};

// Actors: its threads, then its channels.
struct Cluster {
  int id = 0, blocks = 0, threads = 0;
  std::vector<Thread> all;
  std::vector<int> channels;  // the thread whose cp.async it is, or -1

  uint32_t new_channel(int thread) {
    channels.push_back(thread);
    return static_cast<uint32_t>(all.size() + channels.size() - 1);
  }
  std::vector<std::pair<const char*, size_t>> shared;
};

struct Access {
  int cluster = -1;
  uint32_t actor = 0, epoch = 0;
  bool async = false, atomic = false;
  const void *pc = nullptr, *caller = nullptr;
};

struct Cell {
  Access write;
  std::vector<Access> reads;  // and atomic updates, since the last write
};

// 16 bytes of memory: one cell, or eight of two bytes.
struct Granule {
  Cell cell;
  std::unique_ptr<Cell[]> parts;
};
constexpr uintptr_t granule_bytes = 16, page_bytes = 4096, part_bytes = 2;
constexpr int most_reads = 16;  // that a cell remembers: then one by chance goes

struct Page {
  Granule granules[page_bytes / granule_bytes];
};

struct State {
  bool on = true, this_launch = false;
  uintptr_t parameters = 0, parameter_bytes = 0, stack = 0, stack_bytes = 0;
  uint64_t random = 1;
  std::map<int, Cluster> clusters;
  Cluster* cluster = nullptr;
  Thread* thread = nullptr;
  int index = 0;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
  uintptr_t last_page = 0;
  Page* last = nullptr;
  std::unordered_map<const void*, std::shared_ptr<Rows>> tickets[3];
  std::set<std::pair<const void*, const void*>> known;  // races: the places
  std::vector<std::string> reports;
} state;

Page& page_of(uintptr_t address) {
  const uintptr_t number = address / page_bytes;
  if (state.last == nullptr || number != state.last_page) {
    auto& page = state.pages[number];
    if (page == nullptr) page = std::make_unique<Page>();
    state.last_page = number;
    state.last = page.get();
  }
  return *state.last;
}

// How far an actor had come when the running thread learned of it.
bool is_ordered(Order order, const Access& before) {
  const Thread& t = *state.thread;
  if (before.cluster != state.cluster->id) {
    const auto& others = t.clock.of[order].others;
    if (others == nullptr) return false;
    const auto found = others->find(before.cluster);
    return found != others->end() && at(found->second, before.actor) >= before.epoch;
  }
  if (before.actor == static_cast<uint32_t>(state.index)) {
    return order != fenced || before.epoch <= t.fenced_epoch;
  }
  if (t.copier != 0 && before.actor == t.copier) {
    return before.epoch <= (order == fenced ? t.copies_fenced : t.copies_done);
  }
  return at(t.clock.of[order].own, before.actor) >= before.epoch;
}

// ---- Reports --------------------------------------------------------------------------------------------------------

std::string run_and_read(const std::string& command) {
  std::string text;
  if (FILE* pipe = popen(command.c_str(), "r")) {
    char part[4096];
    for (size_t n; (n = fread(part, 1, sizeof(part), pipe)) > 0;) text.append(part, n);
    pclose(pipe);
  }
  return text;
}

// "blocks/multiply.h:187", the first place in the kernels from which `pcs` was reached.
std::string place(const std::vector<const void*>& pcs) {
  std::string otherwise = "an unknown place";
  for (const void* pc : pcs) {
    Dl_info info;
    if (pc == nullptr || dladdr(pc, &info) == 0) continue;
    char command[4096];
    const uintptr_t offset = static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase) - 1;
    std::snprintf(command, sizeof(command), "addr2line -i -e '%s' %zx 2>/dev/null", info.dli_fname, offset);
    const std::string lines = run_and_read(command);
    for (size_t begin = 0; begin < lines.size();) {
      const size_t end = std::min(lines.find('\n', begin), lines.size());
      std::string line = lines.substr(begin, end - begin);
      begin = end + 1;
      if (line.find('?') != std::string::npos || line.find("/include/c++/") != std::string::npos) continue;
      line = line.substr(0, line.find(" ("));  // "(discriminator 2)"
      const size_t csrc = line.rfind("csrc/");
      line = csrc != std::string::npos ? line.substr(csrc + 5) : line.substr(line.rfind('/') + 1);
      if (line.find("emulation/") == std::string::npos) return line;
      otherwise = line;
    }
  }
  return otherwise;
}

std::string who(const Access& a) {
  const Cluster& c = state.clusters[a.cluster];
  const int all = static_cast<int>(c.all.size()), channel = static_cast<int>(a.actor) - all;
  const int thread = channel < 0 ? static_cast<int>(a.actor) : c.channels[channel];
  if (thread < 0) {
    return (c.blocks > 1 ? "the TMA or wgmma of cluster " : "the TMA or wgmma of block ") + std::to_string(a.cluster);
  }
  return (channel < 0 ? "thread " : "cp.async of thread ") + std::to_string(thread % c.threads) + " of block " +
         std::to_string(a.cluster * c.blocks + thread / c.threads);
}

std::string memory_at(uintptr_t address) {
  for (const auto& [id, cluster] : state.clusters) {
    for (int rank = 0; rank < static_cast<int>(cluster.shared.size()); ++rank) {
      const auto& [shared, bytes] = cluster.shared[rank];
      const uintptr_t offset = address - reinterpret_cast<uintptr_t>(shared);
      if (offset < bytes) {
        return "shared memory of block " + std::to_string(id * cluster.blocks + rank) + " at " + std::to_string(offset);
      }
    }
  }
  char text[32];
  std::snprintf(text, sizeof(text), "0x%zx", static_cast<size_t>(address));
  return std::string("global memory at ") + text;
}

const char* verb(const Access& a, bool write) { return a.atomic ? "update" : write ? "write" : "read"; }

void report(uintptr_t address, const Access& now, bool now_writes, const Access& before, bool before_wrote,
            Order order) {
  if (state.reports.size() >= 8 || !state.known.emplace(now.pc, before.pc).second) return;
  std::string text = "race: " + std::string(verb(now, now_writes)) + " of " + memory_at(address) + " by " + who(now) +
                     ", " + place(state.thread->places(now.pc));
  text += before.epoch == UINT32_MAX ? "; the block has ended"
                                     : std::string("; not ordered after its ") + verb(before, before_wrote) + " by " +
                                           who(before) + ", " + place({before.pc, before.caller});
  if (order == fenced && is_ordered(visible, before)) text += " (no fence.proxy.async between them)";
  state.reports.push_back(text);
}

void report_end(uintptr_t address, const Access& before, bool before_wrote, int block) {
  if (state.reports.size() >= 8 || !state.known.emplace(nullptr, before.pc).second) return;
  state.reports.push_back("race: block " + std::to_string(block) + " ends, not ordered after the " +
                          verb(before, before_wrote) + " of " + memory_at(address) + " by " + who(before) + ", " +
                          place({before.pc, before.caller}));
}

// ---- Accesses -------------------------------------------------------------------------------------------------------

// The order in which an access must come after the one before it.
Order needed(const Access& now, bool before_wrote, const Access& before) {
  if (!before_wrote) return over;       // who overwrites must know that the reader is done
  if (!now.async) return visible;       // what is read or overwritten must have arrived
  return before.async ? over : fenced;  // the async proxy sees generic writes after a fence only
}

void access(Cell& cell, uintptr_t address, const Access& now, bool write) {
  const auto check = [&](const Access& before, bool before_wrote) {
    const Order order = needed(now, before_wrote, before);
    if (!is_ordered(order, before)) report(address, now, write, before, before_wrote, order);
  };
  if (cell.write.cluster >= 0) check(cell.write, true);
  std::vector<Access>& reads = cell.reads;
  if (write) {
    for (const Access& before : reads) check(before, false);
    cell.write = now;
    reads.clear();
    return;
  }
  // An access that an earlier one is ordered before stands for it.
  size_t kept = 0;
  for (size_t i = 0; i < reads.size(); ++i) {
    if (reads[i].atomic != now.atomic) {
      check(reads[i], reads[i].atomic);
      reads[kept++] = reads[i];
    } else if (!is_ordered(over, reads[i])) {
      reads[kept++] = reads[i];
    }
  }
  reads.resize(kept);
  if (kept < most_reads) {
    reads.push_back(now);
  } else {
    state.random = state.random * 6364136223846793005ULL + 1442695040888963407ULL;
    reads[(state.random >> 33) % most_reads] = now;
  }
}

void access(uintptr_t address, size_t bytes, Access now, bool write) {
  now.cluster = state.cluster->id;
  const uintptr_t end = address + bytes;
  while (address < end) {
    Granule& g = page_of(address).granules[address % page_bytes / granule_bytes];
    const uintptr_t next = std::min(end, (address / granule_bytes + 1) * granule_bytes);
    if (next - address == granule_bytes && g.parts == nullptr) {
      access(g.cell, address, now, write);
    } else {
      if (g.parts == nullptr) {
        g.parts.reset(new Cell[granule_bytes / part_bytes]);
        for (uintptr_t i = 0; i < granule_bytes / part_bytes; ++i) g.parts[i] = g.cell;
      }
      for (uintptr_t a = address / part_bytes * part_bytes; a < next; a += part_bytes) {
        access(g.parts[a % granule_bytes / part_bytes], a, now, write);
      }
      if (write && next - address == granule_bytes) {  // all parts are alike again
        g.cell = std::move(g.parts[0]);
        g.parts.reset();
      }
    }
    address = next;
  }
}

Access mine(const void* pc) {
  Access a;
  a.actor = static_cast<uint32_t>(state.index);
  a.epoch = state.thread->epoch;
  a.pc = pc;
  a.caller = state.thread->caller();
  return a;
}

void check_registers(uintptr_t address, size_t bytes, const void* pc) {
  for (const Registers& r : state.thread->lent) {
    if (address < r.end && address + bytes > r.begin && state.reports.size() < 8 &&
        state.known.emplace(pc, nullptr).second) {
      state.reports.push_back("race: the accumulators of a wgmma that thread " + std::to_string(state.index) +
                              " has not waited for, " + place(state.thread->places(pc)));
    }
  }
}

// An access of a kernel's own code.
inline void on_access(const void* p, size_t bytes, bool write, const void* pc) {
  if (!watching) return;
  const Quiet quiet;  // functions of the standard library may be the watched copies of the kernels' files
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  if (address - state.stack < state.stack_bytes) {
    if (!state.thread->lent.empty()) check_registers(address, bytes, pc);
    return;
  }
  if (address - state.parameters < state.parameter_bytes) return;
  access(address, bytes, mine(pc), write);
}

void forget(const void* p, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t a = begin / granule_bytes * granule_bytes; a < begin + bytes; a += granule_bytes) {
    page_of(a).granules[a % page_bytes / granule_bytes] = Granule();
  }
}

// What a thread knows of itself, which its clock leaves out.
void raise_self(Epochs& row, const Cluster& c, int index, Order order) {
  const Thread& t = c.all[index];
  raise(row, index, order == fenced ? t.fenced_epoch : t.epoch);
  if (t.copier != 0) raise(row, t.copier, order == fenced ? t.copies_fenced : t.copies_done);
}

// A clock with what these threads know of themselves.
void add_selves(Clock& clock, const Cluster& c, const int* threads, size_t count) {
  const bool alike = clock.of[over].own == clock.of[visible].own;
  for (const Order order : orders) {
    Row& own = clock.of[order].own;
    if (order == visible && alike) {
      own = clock.of[over].own;
      continue;
    }
    auto row = std::make_shared<Epochs>();
    if (own != nullptr) *row = *own;
    for (size_t i = 0; i < count; ++i) raise_self(*row, c, threads[i], order);
    own = std::move(row);
  }
}
Clock clock_with_self() {
  Clock clock = state.thread->clock;
  add_selves(clock, *state.cluster, &state.index, 1);
  return clock;
}

}  // namespace

// ---- A launch and who runs ------------------------------------------------------------------------------------------

void watch(bool on) { state.on = on; }

void begin_launch(const void* parameters, size_t bytes, uint64_t seed) {
  state.this_launch = state.on;
  state.parameters = reinterpret_cast<uintptr_t>(parameters);
  state.parameter_bytes = bytes;
  state.random = seed + 1;
  state.pages.clear();
  state.last = nullptr;
  state.clusters.clear();
  for (auto& tickets : state.tickets) tickets.clear();
  state.known.clear();
  state.reports.clear();
}

std::string end_launch() {
  std::string text;
  for (const std::string& report : state.reports) text += (text.empty() ? "" : "\n") + report;
  state.pages.clear();
  state.last = nullptr;
  state.clusters.clear();
  state.reports.clear();
  return text;
}

void begin_cluster(int cluster, int blocks, int threads) {
  if (!state.this_launch) return;
  Cluster& c = state.clusters[cluster];
  c.id = cluster;
  c.blocks = blocks;
  c.threads = threads;
  c.all.resize(static_cast<size_t>(blocks) * threads);
  c.shared.resize(blocks);
}

void begin_block(int cluster, int rank, const char* shared, size_t bytes) {
  if (!state.this_launch) return;
  forget(shared, bytes);
  state.clusters[cluster].shared[rank] = {shared, bytes};
}

void end_block(int cluster, int rank) {
  if (!state.this_launch) return;
  // All that its threads know: an access that none of them knows may come when the block is gone.
  Cluster& c = state.clusters[cluster];
  Epochs known;
  for (int t = rank * c.threads; t < (rank + 1) * c.threads; ++t) {
    if (const Row& row = c.all[t].clock.of[over].own) {
      for (size_t i = 0; i < row->size(); ++i) raise(known, i, (*row)[i]);
    }
    raise_self(known, c, t, over);
  }
  const auto& [shared, bytes] = c.shared[rank];
  const uintptr_t begin = reinterpret_cast<uintptr_t>(shared);
  Access gone;
  gone.cluster = cluster;
  gone.actor = static_cast<uint32_t>(rank * c.threads);
  gone.epoch = UINT32_MAX;
  for (uintptr_t a = begin; a < begin + bytes; a += granule_bytes) {
    Granule& g = page_of(a).granules[a % page_bytes / granule_bytes];
    for (uintptr_t i = 0; i < (g.parts != nullptr ? granule_bytes / part_bytes : 1); ++i) {
      Cell& cell = g.parts != nullptr ? g.parts[i] : g.cell;
      const auto check = [&](const Access& before, bool before_wrote) {
        if (before.actor < known.size() && known[before.actor] >= before.epoch) return;
        report_end(a, before, before_wrote, cluster * c.blocks + rank);
      };
      if (cell.write.cluster >= 0) check(cell.write, true);
      for (const Access& before : cell.reads) check(before, before.atomic);
    }
    g = Granule();
    g.cell.write = gone;
  }
}

void end_cluster(int cluster) {
  if (!state.this_launch) return;
  Cluster& c = state.clusters[cluster];
  for (const auto& [shared, bytes] : c.shared) forget(shared, bytes);
  c.shared.clear();
  for (Thread& t : c.all) t = Thread();  // its accesses to global memory stay, under its number
}

void enter(int cluster, int thread, const char* stack, size_t bytes, bool fresh) {
  if (!state.this_launch) return;
  state.cluster = &state.clusters[cluster];
  state.thread = &state.cluster->all[thread];
  state.index = thread;
  state.stack = reinterpret_cast<uintptr_t>(stack);
  state.stack_bytes = bytes;
  watching = fresh;
  in_thread = true;
}

void leave() { watching = in_thread = false; }

Quiet::Quiet() : before_(watching) { watching = false; }
Quiet::~Quiet() { watching = before_; }

// ---- Accesses that the compiler does not see ------------------------------------------------------------------------

// Called by the emulation within Quiet or not: it means what it says.
void read(const void* p, size_t bytes) {
  const Quiet quiet;
  if (state.this_launch) access(reinterpret_cast<uintptr_t>(p), bytes, mine(__builtin_return_address(0)), false);
}
void write(const void* p, size_t bytes) {
  const Quiet quiet;
  if (state.this_launch) access(reinterpret_cast<uintptr_t>(p), bytes, mine(__builtin_return_address(0)), true);
}
void update(const void* p, size_t bytes) {
  const Quiet quiet;
  if (!state.this_launch) return;
  Access a = mine(__builtin_return_address(0));
  a.atomic = true;
  access(reinterpret_cast<uintptr_t>(p), bytes, a, false);
}

// ---- What orders ----------------------------------------------------------------------------------------------------

void meet(const std::vector<int>& threads) {
  const Quiet quiet;
  if (!state.this_launch) return;
  Cluster& c = *state.cluster;
  Clock together = c.all[threads[0]].clock;
  for (const int t : threads) {
    for (const Order order : orders) learn(together.of[order], c.all[t].clock.of[order]);
  }
  add_selves(together, c, threads.data(), threads.size());
  for (const int t : threads) {
    c.all[t].clock = together;
    ++c.all[t].epoch;
  }
}

Mailbox::Mailbox() : near_(std::make_shared<Clock>()), far_(std::make_shared<Clock>()) {}

void Mailbox::leave(Scope scope, bool remote) {
  const Quiet quiet;
  if (!state.this_launch) return;
  const Clock known = clock_with_self();
  auto near = std::make_shared<Clock>(*near_);
  for (const Order order : orders) {
    if (order == over || !remote) learn(near->of[order], known.of[order]);
  }
  if (remote && scope == whole_cluster) {
    auto far = std::make_shared<Clock>(*far_);
    for (const Order order : orders) learn(far->of[order], known.of[order]);
    far_ = std::move(far);
  }
  near_ = std::move(near);
  ++state.thread->epoch;
}

void Mailbox::take(Scope scope) const {
  const Quiet quiet;
  if (!state.this_launch) return;
  for (const Order order : orders) {
    learn(state.thread->clock.of[order], near_->of[order]);
    if (scope == whole_cluster) learn(state.thread->clock.of[order], far_->of[order]);
  }
}

void ticket(const void* counter) {
  const Quiet quiet;
  if (!state.this_launch) return;
  const int id = state.cluster->id;
  for (const Order order : orders) {
    auto& left = state.tickets[order][counter];
    const Clock::One& gives = state.thread->at_fence.of[order];
    auto all = left != nullptr ? std::make_shared<Rows>(*left) : std::make_shared<Rows>();
    const auto add = [&all](int cluster, const Row& row) { (*all)[cluster] = join((*all)[cluster], row); };
    if (left != nullptr) {
      auto others = std::make_shared<Rows>(*left);
      Clock::One takes;
      const auto own = others->find(id);
      if (own != others->end()) {
        takes.own = own->second;
        others->erase(own);
      }
      takes.others = std::move(others);
      learn(state.thread->drawn.of[order], takes);
    }
    if (gives.own != nullptr) add(id, gives.own);
    if (gives.others != nullptr) {
      for (const auto& [cluster, row] : *gives.others) add(cluster, row);
    }
    left = std::move(all);
  }
}

void fence_device() {
  const Quiet quiet;
  if (!state.this_launch) return;
  Thread& t = *state.thread;
  for (const Order order : orders) learn(t.clock.of[order], t.drawn.of[order]);
  t.at_fence = clock_with_self();
  ++t.epoch;
}

void fence_async() {
  const Quiet quiet;
  if (!state.this_launch) return;
  Thread& t = *state.thread;
  t.clock.of[fenced] = t.clock.of[visible];
  t.fenced_epoch = t.epoch++;
  t.copies_fenced = t.copies_done;
}

// ---- What runs by itself --------------------------------------------------------------------------------------------

void copy(const void* to, const void* from, size_t bytes) {
  const Quiet quiet;
  if (!state.this_launch) return;
  Access a = mine(__builtin_return_address(0));
  Thread& t = *state.thread;
  if (t.copier == 0) t.copier = state.cluster->new_channel(state.index);
  a.actor = t.copier;
  a.epoch = t.copies + 1;
  if (bytes > 0) access(reinterpret_cast<uintptr_t>(from), bytes, a, false);
  access(reinterpret_cast<uintptr_t>(to), 16, a, true);
}
void commit_copies() {
  if (state.this_launch) ++state.thread->copies;
}
void wait_copies(int pending) {
  if (!state.this_launch) return;
  Thread& t = *state.thread;
  if (t.copies > static_cast<uint32_t>(pending)) t.copies_done = std::max(t.copies_done, t.copies - pending);
}

int new_channel() {
  const Quiet quiet;
  if (!state.this_launch) return 0;
  return static_cast<int>(state.cluster->new_channel(-1));
}

namespace {
Access engines(int channel, uint32_t group, const void* pc) {
  Access a = mine(pc);
  a.actor = static_cast<uint32_t>(channel);
  a.epoch = group;
  a.async = true;
  return a;
}
}  // namespace

void engine_read(const void* p, size_t bytes, int channel, uint32_t group) {
  const Quiet quiet;
  if (!state.this_launch) return;
  access(reinterpret_cast<uintptr_t>(p), bytes, engines(channel, group, __builtin_return_address(0)), false);
}
void engine_write(const void* p, size_t bytes, int channel, uint32_t group) {
  const Quiet quiet;
  if (!state.this_launch) return;
  access(reinterpret_cast<uintptr_t>(p), bytes, engines(channel, group, __builtin_return_address(0)), true);
}

void wait_channel(int channel, uint32_t group) {
  const Quiet quiet;
  if (!state.this_launch) return;
  struct Known {
    Row before, after;
    int channel = -1;
    uint32_t group = 0;
  };
  static Known known[2];  // a warpgroup's threads learn the same one after the other
  for (const Order order : orders) {
    Row& own = state.thread->clock.of[order].own;
    if (at(own, channel) >= group) continue;
    Known& k = known[order == fenced];
    if (k.before != own || own == nullptr || k.channel != channel || k.group != group) {
      auto row = own != nullptr ? std::make_shared<Epochs>(*own) : std::make_shared<Epochs>();
      raise(*row, channel, group);
      k.before = own;
      k.after = std::move(row);
      k.channel = channel;
      k.group = group;
    }
    own = k.after;
  }
  auto& lent = state.thread->lent;
  lent.erase(std::remove_if(lent.begin(), lent.end(),
                            [=](const Registers& r) { return r.channel == channel && r.group <= group; }),
             lent.end());
}

void lend_registers(const void* p, size_t bytes, int channel, uint32_t group) {
  const Quiet quiet;
  if (!state.this_launch) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
  for (Registers& r : state.thread->lent) {
    if (r.begin == begin && r.channel == channel) {
      r.group = group;
      return;
    }
  }
  state.thread->lent.push_back({begin, begin + bytes, channel, group});
}

namespace {
inline void enter_function(const void* caller) {
  if (!in_thread) return;
  Thread& t = *state.thread;
  if (t.depth < Thread::most_callers) t.callers[t.depth] = caller;
  ++t.depth;
}
inline void exit_function() {
  if (in_thread && state.thread->depth > 0) --state.thread->depth;
}
}  // namespace

}  // namespace barlow::emulation::races

// ---- What the compiler calls ----------------------------------------------------------------------------------------

extern "C" {
using namespace barlow::emulation::races;
#define BARLOW_HOOK(NAME, BYTES, WRITE) \
  void NAME(void* p) { on_access(p, BYTES, WRITE, __builtin_return_address(0)); }
#define BARLOW_HOOKS(BYTES)                               \
  BARLOW_HOOK(__tsan_read##BYTES, BYTES, false)           \
  BARLOW_HOOK(__tsan_write##BYTES, BYTES, true)           \
  BARLOW_HOOK(__tsan_unaligned_read##BYTES, BYTES, false) \
  BARLOW_HOOK(__tsan_unaligned_write##BYTES, BYTES, true) \
  BARLOW_HOOK(__tsan_volatile_read##BYTES, BYTES, false)  \
  BARLOW_HOOK(__tsan_volatile_write##BYTES, BYTES, true)
BARLOW_HOOKS(1)
BARLOW_HOOKS(2)
BARLOW_HOOKS(4)
BARLOW_HOOKS(8)
BARLOW_HOOKS(16)
void __tsan_read_range(void* p, unsigned long bytes) { on_access(p, bytes, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, unsigned long bytes) { on_access(p, bytes, true, __builtin_return_address(0)); }
void __tsan_func_entry(void* caller) { enter_function(caller); }
void __tsan_func_exit() { exit_function(); }
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
// Atomics of the emulation's own, in std::shared_ptr and the like; kernels have update().
#define BARLOW_ATOMIC(BITS)                                                                   \
  uint##BITS##_t __tsan_atomic##BITS##_load(const volatile void* p, int) {                    \
    return __atomic_load_n(static_cast<const volatile uint##BITS##_t*>(p), __ATOMIC_ACQUIRE); \
  }                                                                                           \
  void __tsan_atomic##BITS##_store(volatile void* p, uint##BITS##_t x, int) {                 \
    __atomic_store_n(static_cast<volatile uint##BITS##_t*>(p), x, __ATOMIC_RELEASE);          \
  }                                                                                           \
  uint##BITS##_t __tsan_atomic##BITS##_fetch_add(volatile void* p, uint##BITS##_t x, int) {   \
    return __atomic_fetch_add(static_cast<volatile uint##BITS##_t*>(p), x, __ATOMIC_ACQ_REL); \
  }                                                                                           \
  uint##BITS##_t __tsan_atomic##BITS##_fetch_sub(volatile void* p, uint##BITS##_t x, int) {   \
    return __atomic_fetch_sub(static_cast<volatile uint##BITS##_t*>(p), x, __ATOMIC_ACQ_REL); \
  }
BARLOW_ATOMIC(8)
BARLOW_ATOMIC(32)
BARLOW_ATOMIC(64)
}
