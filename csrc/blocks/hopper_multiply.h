// hopper_multiply.h: a tile of a matrix product on Hopper: TMA, a ring of stages, wgmma.
//
//     P[m, n] = sum over k of a[m, k] * b[n, k]            both factors in half precision, k-major or mn-major each
//
// * A block is eight consumer warps (two warpgroups of 64 rows each) and one producer warp. The other three warps of
//   its warpgroup do nothing, or the input gradients' epilogue (hopper_epilogue.h). The producer asks for boxes of both
//   factors, STAGES tiles of 64 k ahead; the consumers start wgmma on what has arrived. Each stage has two mbarriers:
//   `full` counts the bytes that arrive, `empty` the warps that have read. Nobody waits for more than the data it needs.
// * The grid is persistent: a block does one piece of work after the other, and while the consumers finish a tile, the
//   producer already fills the ring for the next one.
// * Accumulators live in registers: 128 of them a thread for 128 x 256. The producer gives its registers to the
//   consumers (setmaxnreg). No second accumulator for long sums would fit: callers keep sums under 8192 products.
// * CLUSTER blocks that work on the same columns of P share the tile of b: each fetches a part of it for all of them.
//   `empty` then counts the warps of the whole cluster.
//
// Per 64 k of a 128 x 256 tile, one multiprocessor: 4 Mi FLOPs, 1024 cycles at the peak of 4096 a cycle. Shared memory
// delivers 128 bytes a cycle and gives 80 KiB to the tensor cores (each warpgroup reads its 8 KiB of a and all 32 KiB
// of b) and takes 48 KiB from the TMA: exactly 1024 cycles. A 128 x 128 tile has 512 cycles for
// 48 + 32 KiB, which take 640: it is for where there are too few tiles. On the diagonal of a symmetric product a and b
// are the same rows, and come once: 48 + 16 KiB. From L2 a tile of 128 x 256 takes 48 bytes a cycle, 32 in a cluster
// of two, 20 in one of eight.
//
// float32 stays with multiply.h: wgmma takes TF32 factors only k-major.
#pragma once

#include "gpu/hopper.h"

namespace barlow {

// The consumers' threads are the first of a block: thread() counts them.
struct Consumers {
  static constexpr int threads = 256;
  static BARLOW_DEVICE void barrier(BARLOW_SITE) { barrier_of<1, threads>(BARLOW_AT_SITE); }
};
// Three warps more, of kernels whose tiles are finished while the next ones are multiplied; the last warp is the
// producer. A warpgroup is not to be had: with 512 threads ptxas gives a thread 128 registers, and P alone takes them.
struct Finishers {
  static constexpr int first = Consumers::threads, threads = 96;
  static BARLOW_DEVICE int thread() { return barlow::thread() - first; }
  static BARLOW_DEVICE int warp() { return barlow::warp() - first / 32; }
  static BARLOW_DEVICE void barrier(BARLOW_SITE) { barrier_of<2, threads, first>(BARLOW_AT_SITE); }
};
// Both, at the end, when nothing is left to multiply.
struct Everyone {
  static constexpr int threads = Consumers::threads + Finishers::threads;
  static BARLOW_DEVICE void barrier(BARLOW_SITE) { barrier_of<3, threads>(BARLOW_AT_SITE); }
};

// What a block works on: `steps` tiles of k from k on, of the tile of P at (row, column).
struct HopperTile {
  const TensorMap *a, *b;
  int row, column, k, steps;
  bool diagonal = false;  // b's rows are the first of a's: only a is copied
};

template <class T_, int N_, int STAGES_, int CLUSTER_, bool A_K_MAJOR, bool B_K_MAJOR>
struct HopperMultiply {
  using T = T_;
  using Team = Consumers;
  static constexpr int M = 128, N = N_, K = 64, STAGES = STAGES_, CLUSTER = CLUSTER_;
  static constexpr int threads = 384;
  static constexpr int box_bytes = K * 128;  // of mn-major boxes
  static constexpr int a_bytes = M * 128, stage_bytes = (M + N) * 128;
  static constexpr int shared_bytes = STAGES * stage_bytes + 128;  // with the barriers; the epilogue's comes after
  static constexpr int ROWS = 1, COLUMNS = N / 8;
  static_assert(2 * STAGES * 8 <= 128 && N % CLUSTER == 0 && K / CLUSTER % 8 == 0, "parts of boxes are whole swizzles");
  static constexpr bool may_be_diagonal = A_K_MAJOR && B_K_MAJOR && CLUSTER == 1 && N <= M;

  // acc[0][j]: as d[j] of wgmma.
  using Accumulator = float[ROWS][COLUMNS][4];

  // First row and column, within the tile, of this thread's numbers in fragment (0, j).
  static BARLOW_DEVICE int row_of(int) { return warp() * 16 + lane() / 4; }
  static BARLOW_DEVICE int column_of(int j) { return j * 8 + lane() % 4 * 2; }

  static BARLOW_DEVICE char* epilogue_memory() { return shared_memory() + shared_bytes; }

  // A place in the ring: every stage is used once before the phase changes.
  struct Place {
    int stage = 0, phase = 0;
    BARLOW_DEVICE void advance() {
      if (++stage == STAGES) {
        stage = 0;
        phase ^= 1;
      }
    }
  };

  // All threads, first and last. BLOCKS: of a cluster, CLUSTER or, where they do not share b, more. Nobody may leave
  // whose shared memory others still copy to, read or arrive at.
  template <int BLOCKS>
  static BARLOW_DEVICE void begin() {
    if (thread() == 0) {
      for (int s = 0; s < STAGES; ++s) {
        mbarrier_init(full(s), 1);
        mbarrier_init(empty(s), CLUSTER * Team::threads / 32);
      }
      mbarrier_fence_init();
    }
    if constexpr (BLOCKS > 1) {
      cluster_barrier();
    } else {
      barrier();
    }
  }
  template <int BLOCKS>
  static BARLOW_DEVICE void end() {
    if constexpr (BLOCKS > 1) cluster_barrier();
  }

  // The producer's part of a tile: one thread.
  static BARLOW_DEVICE void load(Place& place, const HopperTile& t) {
    const int rank = CLUSTER > 1 ? cluster_rank() : 0;
    const bool diagonal = may_be_diagonal && t.diagonal;
    int k = t.k;
#pragma unroll 1  // the producer has few registers, and time
    for (int step = 0; step < t.steps; ++step, k += K) {
      uint64_t* const arrived = full(place.stage);
      mbarrier_wait(empty(place.stage), place.phase ^ 1);
      mbarrier_arrive_expect(arrived, diagonal ? a_bytes : stage_bytes);
      char* const a = stage(place);
      char* const b = a + a_bytes;
      if constexpr (A_K_MAJOR) {
        copy_box(a, *t.a, t.row, k, arrived);
      } else {
        for (int m = 0; m < M; m += box_columns) copy_box(a + m * 128, *t.a, k, t.row + m, arrived);
      }
      if constexpr (B_K_MAJOR) {
        const int part = N / CLUSTER * rank;
        if (!diagonal) copy_part(b + part * 128, *t.b, t.column + part, k, arrived);
      } else {
        const int part = K / CLUSTER * rank;
        for (int n = 0; n < N; n += box_columns) {
          copy_part(b + n * 128 + part * 128, *t.b, k + part, t.column + n, arrived);
        }
      }
      place.advance();
    }
  }

  // The consumers' part: acc = the sum over `steps` stages, at least one. diagonal: as the tile's.
  static BARLOW_DEVICE void multiply(Place& place, Accumulator& acc, int steps, bool diagonal = false) {
    const int b_offset = may_be_diagonal && diagonal ? 0 : a_bytes;  // in a stage
    start(place, acc, false, b_offset);
    for (int step = 1; step < steps; ++step) {
      const int before = place.stage;
      place.advance();
      start(place, acc, true, b_offset);
      wgmma_wait<1>();  // the stage before has been read; this one's products are under way
      release(before);
    }
    wgmma_wait<0>();
    pin_registers(acc[0]);
    release(place.stage);
    place.advance();
  }

  // What the consumers read besides comes through the same ring: a stage with 128 rows by 128 columns of x, in two
  // boxes. One thread.
  static constexpr int rows_box = M * 128;  // bytes
  static BARLOW_DEVICE void load_rows(Place& place, const TensorMap& x, int row, int column) {
    uint64_t* const arrived = full(place.stage);
    mbarrier_wait(empty(place.stage), place.phase ^ 1);
    mbarrier_arrive_expect(arrived, 2 * rows_box);
    for (int box = 0; box < 2; ++box) {
      copy_box(stage(place) + box * rows_box, x, row, column + box * box_columns, arrived);
    }
    place.advance();
  }
  // The consumers' side of it: the stage, when it has arrived; and that this warp is done with it.
  static BARLOW_DEVICE char* wait(const Place& place) {
    mbarrier_wait(full(place.stage), place.phase);
    return stage(place);
  }
  static BARLOW_DEVICE void done(Place& place) {
    warp_barrier();
    release(place.stage);
    place.advance();
  }

  // Tensor maps of the factors: of a, [m, k] k-major or [k, m] mn-major in memory, and of b alike.
  template <class What>
  static TensorMap a_map(const Matrix& x, int rows, int columns, const What& what) {
    return tensor_map(x, rows, columns, A_K_MAJOR ? M : K, what);
  }
  template <class What>
  static TensorMap b_map(const Matrix& x, int rows, int columns, const What& what) {
    return tensor_map(x, rows, columns, (B_K_MAJOR ? N : K) / CLUSTER, what);
  }

 private:
  static BARLOW_DEVICE char* stage(const Place& place) { return shared_memory() + place.stage * stage_bytes; }
  static BARLOW_DEVICE uint64_t* full(int stage) {
    return reinterpret_cast<uint64_t*>(shared_memory() + STAGES * stage_bytes) + stage;
  }
  static BARLOW_DEVICE uint64_t* empty(int stage) { return full(STAGES + stage); }

  static BARLOW_DEVICE void copy_part(char* to, const TensorMap& map, int row, int column, uint64_t* arrived) {
    if constexpr (CLUSTER > 1) {
      copy_box_to_all<CLUSTER>(to, map, row, column, arrived);
    } else {
      copy_box(to, map, row, column, arrived);
    }
  }

  // Starts the products of a stage when it has arrived.
  static BARLOW_DEVICE void start(const Place& place, Accumulator& acc, bool add, int b_offset) {
    const uint32_t from = shared_address(stage(place));
    const uint64_t a = wgmma_descriptor<A_K_MAJOR, box_bytes>(from + warp() / 4 * 64 * 128);  // a warpgroup's 64 rows
    const uint64_t b = wgmma_descriptor<B_K_MAJOR, box_bytes>(from + b_offset);
    mbarrier_wait(full(place.stage), place.phase);
    pin_registers(acc[0]);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < K / 16; ++k) {
      Wgmma<T, N, A_K_MAJOR, B_K_MAJOR>::run(acc[0], a + k * wgmma_next_k<A_K_MAJOR>, b + k * wgmma_next_k<B_K_MAJOR>,
                                             add || k > 0);
    }
    wgmma_commit();
  }

  // This warp has read a stage: every block that copies to it must know.
  static BARLOW_DEVICE void release(int stage) {
    if constexpr (CLUSTER > 1) {
      if (lane() < CLUSTER) mbarrier_arrive(empty(stage), lane());
    } else {
      if (lane() == 0) mbarrier_arrive(empty(stage));
    }
  }
};

// Some neighbouring columns of a product's tile, with a product's names: what an epilogue takes at a time.
template <class Product, int N_>
struct ColumnsOf {
  using T = typename Product::T;
  using Team = typename Product::Team;
  static constexpr int M = Product::M, N = N_, threads = Product::threads;
  static constexpr int ROWS = 1, COLUMNS = N / 8;
  using Accumulator = float[ROWS][COLUMNS][4];
  static BARLOW_DEVICE int row_of(int i) { return Product::row_of(i); }
  static BARLOW_DEVICE int column_of(int j) { return Product::column_of(j); }
  static BARLOW_DEVICE const Accumulator& of(const typename Product::Accumulator& acc, int part) {
    return reinterpret_cast<const Accumulator&>(acc[0][part * COLUMNS]);
  }
};

// A kernel of such products. Job is what differs:
//
//     struct Job {
//       using Product;
//       static constexpr int cluster;                     // blocks: Product::CLUSTER, or more that share nothing
//       struct Params { ...; int works; };
//       BARLOW_DEVICE Job(const Params&);                 // by every thread
//       BARLOW_DEVICE void produce(Place&, int work);     // by the producer warp; what it loads, lane 0 loads
//       BARLOW_DEVICE void consume(Place&, int work);     // by the consumers
//       BARLOW_DEVICE void finish(int work, bool last);   // by the finishers, where FINISH
//       BARLOW_DEVICE void help(int work);                // by the consumers, who have nothing left but the last one
//       static constexpr int epilogue_bytes;              // from Product::epilogue_memory() on
//       static constexpr const char* name;
//     };
//
// A cluster takes works in turn. Both sides go through the same stages of the ring in the same order. With FINISH a
// tile's epilogue is a third side's, beside the next tile's product.
template <class Job, bool FINISH = false>
struct HopperKernel {
  using Product = typename Job::Product;
  using Params = typename Job::Params;
  static constexpr const char* name = Job::name;
  static constexpr int threads = Product::threads, cluster = Job::cluster;
  static constexpr int blocks_per_sm = 1;
  // Of a thread: a launch gives each of 384 threads 168, and the producer's warpgroup gives the consumers what it can.
  // Finishers need almost as many.
  static constexpr int producer_registers = FINISH ? 152 : 40, consumer_registers = FINISH ? 176 : 232;
  static constexpr bool persistent = true;
  static constexpr int shared_bytes = Product::shared_bytes + Job::epilogue_bytes;
  static_assert(shared_bytes <= 227 * 1024, "fits a multiprocessor");

  static BARLOW_DEVICE void run(const Params& params) {
    Job job(params);
    Product::template begin<cluster>();
    // Each side counts for itself: what all had in registers, all would keep there. The last work is returned.
    const auto each_work = [&params](auto act) {
      const int step = grid_size() / cluster;
      int work = block_id() / cluster;
      for (; work < params.works; work += step) act(work, work + step >= params.works);
      return work - step;
    };
    typename Product::Place place;
    if (thread() >= Consumers::threads) {
      fewer_registers<producer_registers>();
      if (warp() == threads / 32 - 1) {
        each_work([&](int work, bool) {
          job.produce(place, work);
          warp_barrier();
        });
      } else if constexpr (FINISH) {
        each_work([&](int work, bool last) { job.finish(work, last); });
      }
    } else {
      more_registers<consumer_registers>();
      const int last = each_work([&](int work, bool) { job.consume(place, work); });
      if constexpr (FINISH) job.help(last);
    }
    Product::template end<cluster>();
  }
};

}  // namespace barlow
