// reduce.h: sums over a team of threads (WholeBlock, say) and over blocks, always in the same order, so that the same
// input gives the same bits; and the three terms of the loss, which are such sums.
#pragma once

#include "gpu/device.h"

namespace barlow {

// A team's threads stand over a tile of numbers as rows of GROUPS threads, each with E neighbouring columns. The sum
// over the rows of each column, the same bits in every thread. scratch: Team::threads / 32 * GROUPS * E numbers of
// shared memory.
template <class Team, int GROUPS, int E>
BARLOW_DEVICE void sum_over_rows(float (&x)[E], float* scratch) {
  static_assert(GROUPS <= 32 && 32 % GROUPS == 0, "a warp holds whole rows");
#pragma unroll
  for (int e = 0; e < E; ++e) x[e] = warp_sum<GROUPS>(x[e]);
  if (lane() < GROUPS) {
#pragma unroll
    for (int e = 0; e < E; ++e) scratch[(warp() * GROUPS + lane()) * E + e] = x[e];
  }
  Team::barrier();
#pragma unroll
  for (int e = 0; e < E; ++e) x[e] = 0.f;
  for (int w = 0; w < Team::threads / 32; ++w) {
#pragma unroll
    for (int e = 0; e < E; ++e) x[e] += scratch[(w * GROUPS + lane() % GROUPS) * E + e];
  }
  Team::barrier();  // scratch may be written again
}

// The sum over a team, the same bits in every thread. scratch: Team::threads / 32 doubles of shared memory.
template <class Team>
BARLOW_DEVICE double block_sum(double x, double* scratch) {
  x = warp_sum(x);
  if (lane() == 0) scratch[warp()] = x;
  Team::barrier();
  x = 0;
  for (int w = 0; w < Team::threads / 32; ++w) x += scratch[w];
  Team::barrier();
  return x;
}

template <class Team>
BARLOW_DEVICE float block_max(float x, float* scratch) {
#pragma unroll
  for (int mask = 16; mask >= 1; mask /= 2) x = larger(x, shuffle_xor(x, mask));
  if (lane() == 0) scratch[warp()] = x;
  Team::barrier();
  x = scratch[0];
  for (int w = 1; w < Team::threads / 32; ++w) x = larger(x, scratch[w]);
  Team::barrier();
  return x;
}

// The sum of `count` numbers that other blocks wrote.
template <class Team>
BARLOW_DEVICE double sum_of(const double* x, int64_t count, double* scratch) {
  double total = 0;
  for (int64_t i = thread(); i < count; i += Team::threads) total += load_from_l2(x + i);
  return block_sum<Team>(total, scratch);
}

// A counter that `blocks` blocks come to, each after its part of some work.
struct Arrival {
  int* counter;
  int blocks;
};

// For each counter, whether this block is the last to come; it is 0 again then. Whatever all of them wrote before can be
// read after, past L1 (load_from_l2). Tickets decide who does the rest of the work, never the order of additions.
// scratch: COUNT ints of shared memory.
template <class Team, int COUNT>
BARLOW_DEVICE void arrive(const Arrival (&arrivals)[COUNT], bool (&last)[COUNT], int* scratch) {
  Team::barrier();
  if (thread() == 0) {  // for all: what the barrier has made visible to this thread, its fence makes so to the device
    fence_device();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) scratch[i] = draw_ticket(arrivals[i].counter);
    fence_device();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (scratch[i] == arrivals[i].blocks - 1) reset_tickets(arrivals[i].counter);
    }
  }
  Team::barrier();
#pragma unroll
  for (int i = 0; i < COUNT; ++i) last[i] = scratch[i] == arrivals[i].blocks - 1;
  Team::barrier();
}

template <class Team>
BARLOW_DEVICE bool last_to_arrive(int* counter, int blocks, int* scratch) {
  bool last[1];
  arrive<Team, 1>({{counter, blocks}}, last, scratch);
  return last[0];
}

// off_sum: of C_ij^2 off the diagonal; sums: [2, slabs] of normalize. NaN passes.
template <class Team>
BARLOW_DEVICE void store_terms(double off_sum, const double* sums, int slabs, float lambd, float scale, float* loss,
                               float* on_diag, float* off_diag, double* scratch) {
  const double on_sum = sum_of<Team>(sums, slabs, scratch);
  if (off_sum < 0) off_sum = 0;
  if (thread() == 0) {
    *loss = static_cast<float>((on_sum + static_cast<double>(lambd) * off_sum) * static_cast<double>(scale));
    *on_diag = static_cast<float>(on_sum);
    *off_diag = static_cast<float>(off_sum);
  }
}

}  // namespace barlow
