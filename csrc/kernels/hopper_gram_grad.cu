// gram_grad on Hopper: gram_grad.h with hopper_multiply.h's product and hopper_epilogue.h, half precision.
//
// A cluster of 2, 4 or 8 blocks owns a slab of 256 features with all N rows: each block computes row tiles of 128 of P,
// all of them share the tile of A_hat (or B_hat), of which each fetches a part. The consumers multiply, add up A_hat P
// over their rows, and hand P over; the finishers add up the sums of the cluster's blocks through distributed shared
// memory, always in the order of the blocks, and make the gradient, while the consumers are at the next tile.
//
// Where every block has one row tile, P waits for the sums, and the gradient is stored once: no second walk over memory
// is needed. Else a block walks over its row tiles, and over what it has stored, as gram_grad.h says; the second walk
// runs beside the next slab's products.
//
// own q differs from what gram_grad.h adds up by own's rounding: A_hat, half precision, lies in L2 already. It makes
// 2^-9 of what the sums tell, divided by sqrt(N), and saves the consumers the features' weights.
//
// The cluster is chosen by how long all slabs take. Fewer blocks leave fewer row tiles empty (1100 rows are 9 tiles: 10
// with clusters of 2, 16 with clusters of 8) and fill the chip better: it holds 15 clusters of 8, 33 of 4, 66 of 2.
#include "blocks/hopper_epilogue.h"
#include "kernels/gram_grad.h"
#include "kernels/hopper_kernels.h"

namespace barlow {
namespace {

BARLOW_DEVICE void load_four(const float* from, float (&x)[4]) {
  const Vec16 v = load(reinterpret_cast<const Vec16*>(from));
#pragma unroll
  for (int e = 0; e < 4; ++e) x[e] = bits_to_float(v.word[e]);
}
BARLOW_DEVICE void store_four(float* to, const float (&x)[4]) { store(reinterpret_cast<Vec16*>(to), pack(x, 0.f)); }

template <class T, int CLUSTER, bool WALK>
struct GramGradJob {
  using Product = HopperMultiply<T, 256, 3, CLUSTER, true, false>;
  using Place = typename Product::Place;
  using Tile = HandOver<Product>;
  static constexpr int cluster = Product::CLUSTER;
  struct Params {
    TensorMap k[2], hat[2], rows[2];  // of each view: K of the other, and A_hat as a factor and as rows
    InputGrad p;
    EpilogueMatrices m[2];
    int first_view, views, parts;  // row tiles of a block
    float by_n;                    // 1 / N
    int works;
  };
  // grad = p P + (y Y + (x X + offset)) of each feature, own = scale X + offset_own. Until the sums are complete, x and
  // offset lack what only they tell, `late` times the sum, of the multiple of own.
  enum { of_p, of_y, of_x, of_offset, combined, of_scale = combined, of_offset_own, of_late, weight_count };
  struct Memory {
    typename Tile::Memory tile;                       // 128-byte aligned
    float sums[Consumers::threads / 32][Product::N];  // of A_hat P: each consumers' warp's rows
    float totals[2][Product::N];                      // all of this block's rows; this slab's and the next one's
    float weights[weight_count][Product::N];
    uint64_t exchanged;  // every block of the cluster has written its totals
  };
  static constexpr const char* name = "gram_grad";
  static constexpr int epilogue_bytes = sizeof(Memory);
  using Rows = FinishedRows<T, WALK ? 4 : 8>;
  static constexpr int features = 4;  // neighbours, whose weights a finisher works out: two of the three warps do

  const Params& params;
  Memory& memory;
  Tile tile;
  int exchanges = 0;

  BARLOW_DEVICE explicit GramGradJob(const Params& p)
      : params(p), memory(*reinterpret_cast<Memory*>(Product::epilogue_memory())), tile(memory.tile) {
    if (thread() == 0) mbarrier_init(&memory.exchanged, CLUSTER);
    if (thread() == Consumers::threads) {
      for (int view = p.first_view; view < p.first_view + p.views; ++view) {
        prefetch_map(p.k[view]);
        prefetch_map(p.hat[view]);
        prefetch_map(p.rows[view]);
      }
    }
  }

  // Both views of a slab after each other: they read the same inputs.
  BARLOW_DEVICE int view_of(int work) const { return params.first_view + work % params.views; }
  BARLOW_DEVICE int column_of(int work) const { return work / params.views * Product::N; }
  BARLOW_DEVICE int row_of(int part) const { return (part * CLUSTER + cluster_rank()) * Product::M; }
  BARLOW_DEVICE int parts() const { return WALK ? params.parts : 1; }
  BARLOW_DEVICE int steps() const { return ceil_div(params.p.n, Product::K); }

  BARLOW_DEVICE void produce(Place& ring, int work) const {
    if (lane() != 0) return;
    const int view = view_of(work), column = column_of(work);
#pragma unroll 1
    for (int part = 0; part < parts(); ++part) {
      Product::load(ring, {&params.k[view], &params.hat[view], row_of(part), column, 0, steps()});
      if (!params.p.normalized) continue;
      for (int c = 0; c < Product::N; c += 2 * box_columns) {
        Product::load_rows(ring, params.rows[view], row_of(part), column + c);
      }
    }
  }

  BARLOW_DEVICE void consume(Place& ring, int) {
    typename Product::Accumulator acc;
#pragma unroll 1
    for (int part = 0; part < parts(); ++part) {
      Product::multiply(ring, acc, steps());
      tile.wait_for_room();
#pragma unroll
      for (int c = 0; c < Tile::boxes; c += 2) {
        if (params.p.normalized) {
          char* const rows = Product::wait(ring);
          add_own(rows, acc, c);
          add_own(rows + Product::rows_box, acc, c + 1);
          Product::done(ring);
        }
        tile.put(acc, c);
        tile.put(acc, c + 1);
      }
      tile.give();
    }
  }

  // The sums of A_hat P over this warp's rows. Rows and columns that do not exist are 0 in both.
  BARLOW_DEVICE void add_own(char* rows, const typename Product::Accumulator& acc, int c) const {
    float sums[2 * box_fragments];
#pragma unroll
    for (int j = 0; j < box_fragments; ++j) {
      const float (&p)[4] = acc[0][c * box_fragments + j];
      float upper[2], lower[2];
      unpack_two<T>(*in_box(rows, j, 0), upper);
      unpack_two<T>(*in_box(rows, j, 1), lower);
#pragma unroll
      for (int e = 0; e < 2; ++e) sums[2 * j + e] = upper[e] * p[e] + lower[e] * p[2 + e];
    }
    sum_columns(sums);
    float* const to = memory.sums[warp()] + c * box_columns + 2 * lane();
    to[0] = sums[0];
    to[1] = sums[1];
  }

  BARLOW_DEVICE void finish(int work, bool last) {
    const int view = view_of(work), column = column_of(work);
    Finishers::barrier();  // everybody has the last slab's weights
    if (has_features()) make_weights(view, column);
    Finishers::barrier();
#pragma unroll 1
    for (int part = 0; part < parts(); ++part) {
      const bool helped = last && !WALK;
      Rows rows = rows_of(work, part, finishers_share(helped), false);
      tile.wait_for_tile();
      if (params.p.normalized) add_totals(part);
      if (params.p.normalized && !WALK) receive_totals();
      if (helped) Everyone::barrier();  // the weights
      first_walk(rows);
      tile.take();
    }
    if (!WALK || !params.p.normalized) return;
    Finishers::barrier();  // everybody has the first walk's weights
    receive_totals();
    if (last) Everyone::barrier();  // the weights, and what is stored
    second_walk(work, finishers_share(last));
  }

  // Where blocks walk twice, with the second walk.
  BARLOW_DEVICE void help(int work) {
    if constexpr (WALK) {
      if (!params.p.normalized) return;
      Everyone::barrier();
      second_walk(work, helpers_share());
    } else {
      Rows rows = rows_of(work, 0, helpers_share(), false);
      Everyone::barrier();
      first_walk(rows);
    }
  }

  // Own, and the other view or what is stored.
  BARLOW_DEVICE Rows rows_of(int work, int part, RowShare share, bool stored) const {
    const EpilogueMatrices& m = params.m[view_of(work)];
    return {m.own, stored ? m.grad : m.other, m.grad, params.p, share, row_of(part), column_of(work)};
  }
  BARLOW_DEVICE void first_walk(Rows& rows) const {
    float of[combined][8];
    load_weights<of_p>(of);
    rows.each([&](int row, const float (&own)[8], const float (&other)[8], float (&g)[8]) {
      tile.get(row, g);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        g[e] = of[of_p][e] * g[e] + (of[of_y][e] * other[e] + (of[of_x][e] * own[e] + of[of_offset][e]));
      }
    });
  }
  BARLOW_DEVICE void second_walk(int work, RowShare share) const {
    float of[combined][8];
    load_weights<of_x>(of);
#pragma unroll 1
    for (int part = 0; part < params.parts; ++part) {
      Rows rows = rows_of(work, part, share, true);
      rows.each([&](int, const float (&own)[8], const float (&stored)[8], float (&g)[8]) {
#pragma unroll
        for (int e = 0; e < 8; ++e) g[e] = stored[e] + (of[of_x][e] * own[e] + of[of_offset][e]);
      });
    }
  }

  static BARLOW_DEVICE int first_feature() { return features * Finishers::thread(); }
  static BARLOW_DEVICE bool has_features() { return first_feature() < Product::N; }

  // The sums of A_hat P over all rows of the block; the last ones tell the cluster that it may read them.
  BARLOW_DEVICE void add_totals(int part) {
    float* const totals = &memory.totals[exchanges % 2][first_feature()];
    if (has_features()) {
      float sum[features] = {}, x[features];
      if (WALK && part > 0) load_four(totals, sum);
#pragma unroll
      for (int i = 0; i < Consumers::threads / 32; ++i) {
        load_four(&memory.sums[i][first_feature()], x);
#pragma unroll
        for (int f = 0; f < features; ++f) sum[f] += x[f];
      }
      store_four(totals, sum);
    }
    if (part < parts() - 1) return;
    Finishers::barrier();
    if (Finishers::thread() < CLUSTER) mbarrier_arrive_cluster(&memory.exchanged, Finishers::thread());
  }

  // Those of all rows of the slab, and what follows from them: of mean_n(own q), only this was not known.
  BARLOW_DEVICE void receive_totals() {
    mbarrier_wait_cluster(&memory.exchanged, exchanges % 2);
    if (has_features()) {
      float sum[features] = {};
#pragma unroll
      for (int rank = 0; rank < CLUSTER; ++rank) {
        const float* const totals = &memory.totals[exchanges % 2][first_feature()];
        const Vec16 four = load_from_block(reinterpret_cast<const Vec16*>(totals), rank);
#pragma unroll
        for (int f = 0; f < features; ++f) sum[f] += bits_to_float(four.word[f]);
      }
      float late[features], scale[features], offset_own[features], x[features], offset[features];
      load_weight(of_late, late);
      load_weight(of_scale, scale);
      load_weight(of_offset_own, offset_own);
      load_weight(of_x, x);
      load_weight(of_offset, offset);
#pragma unroll
      for (int f = 0; f < features; ++f) {
        const float own = late[f] * sum[f];
        x[f] = own * scale[f] + (WALK ? 0.f : x[f]);  // a second walk adds what was missing
        offset[f] = own * offset_own[f] + (WALK ? 0.f : offset[f]);
      }
      store_weight(of_x, x);
      store_weight(of_offset, offset);
    }
    // Nobody writes these totals again before everybody has read them: the exchange of the next ones lies between.
    ++exchanges;
    Finishers::barrier();
  }

  BARLOW_DEVICE void make_weights(int view, int column) const {
    GramWeights<features> w;
    w.set(params.p, view, column + first_feature());
    float of[weight_count][features];
#pragma unroll
    for (int f = 0; f < features; ++f) {
      of[of_p][f] = w.w.weight_p[f] * (1.f / Tile::scale);
      of[of_y][f] = w.w.weight_y[f];
      of[of_x][f] = w.w.weight_x[f] * w.w.scale_x[f];
      of[of_offset][f] = w.w.weight_x[f] * w.w.offset_x[f] + w.w.offset_y[f];
      of[of_scale][f] = w.w.scale_x[f];
      of[of_offset_own][f] = w.w.offset_x[f];
      of[of_late][f] = -w.kappa[f] * w.w.weight_p[f] * params.by_n;
    }
#pragma unroll
    for (int which = 0; which < weight_count; ++which) store_weight(which, of[which]);
  }
  BARLOW_DEVICE void store_weight(int which, const float (&x)[features]) const {
    store_four(&memory.weights[which][first_feature()], x);
  }
  BARLOW_DEVICE void load_weight(int which, float (&x)[features]) const {
    load_four(&memory.weights[which][first_feature()], x);
  }
  // Of this lane's columns.
  template <int FIRST>
  BARLOW_DEVICE void load_weights(float (&of)[combined][8]) const {
#pragma unroll
    for (int which = FIRST; which < combined; ++which) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float four[4];
        load_four(&memory.weights[which][lane() * 8 + half * 4], four);
#pragma unroll
        for (int e = 0; e < 4; ++e) of[which][half * 4 + e] = four[e];
      }
    }
  }
};

template <class T, int CLUSTER, bool WALK>
void launch_gram_grad(const InputGrad& p, Stream stream) {
  using Job = GramGradJob<T, CLUSTER, WALK>;
  using Kernel = HopperKernel<Job, true>;
  const auto what = [&p] { return launch_name(Kernel::name, p.n, p.d); };
  typename Kernel::Params params{};
  params.p = p;
  params.by_n = 1.f / p.n;
  params.parts = ceil_div(p.n, CLUSTER * Job::Product::M);
  params.first_view = p.grad[0].data == nullptr ? 1 : 0;
  params.views = (p.grad[0].data != nullptr) + (p.grad[1].data != nullptr);
  params.works = ceil_div(p.d, Job::Product::N) * params.views;
  for (int view = 0; view < 2; ++view) {
    Matrix k = p.product;  // K of the other view
    k.data = static_cast<char*>(k.data) + (1 - view) * p.n * k.row_stride * sizeof(T);
    params.k[view] = Job::Product::a_map(k, p.n, p.n, what);
    params.hat[view] = Job::Product::b_map(p.hat[view], p.n, p.d, what);
    params.rows[view] = tensor_map(p.hat[view], p.n, p.d, Job::Product::M, what);
    params.m[view] = epilogue_matrices(p, view);
  }
  launch_clusters<Kernel>(params.works, stream, params, p.n, p.d);
}

// Blocks that share a slab, and whether each walks over several row tiles.
struct ClusterChoice {
  int cluster = 0;  // 0: none fits
  bool walk = false;
  int at_once = 0;
};

template <int CLUSTER, bool WALK>
void consider(ClusterChoice& best, int64_t& least, int n, int64_t slabs, int device) {
  const int rows = ceil_div(n, 128), parts = ceil_div(rows, CLUSTER);
  const int at_once = clusters_at_once<HopperKernel<GramGradJob<bfloat16, CLUSTER, WALK>, true>>(device);
  if (at_once == 0 || WALK != (parts > 1)) return;
  // In tenths of a step, by planning/cuda.py's figures. A row tile takes what the longest of three takes: the
  // consumers' steps and sums, the finishers' walks, or L2, which hands out 32 KiB a step. The last walks run beside
  // nothing.
  const int64_t steps = ceil_div(n, 64), tiles = ceil_div(slabs, int64_t{at_once}) * parts;
  const int64_t multiply = 10 * steps + 22, finish = WALK ? 244 : 73;
  const int64_t read = 10 * (steps * (16 + 32 / CLUSTER) + (WALK ? 320 : 192)) / 32;
  int64_t time = tiles * larger(multiply, larger(finish, read)) + (WALK ? 136 + 34 * parts : 35);
  // Steps are certain, the rest is not: unequal shares must be faster by more than what they waste.
  time *= 100 * tiles * device_info(device).multiprocessors > 115 * rows * slabs ? 115 : 100;
  if (time < least) {
    least = time;
    best = {CLUSTER, WALK, at_once};
  }
}

// The larger of two clusters that take as long: its blocks ask less of L2.
ClusterChoice choose_cluster(int n, int64_t slabs, int device) {
  ClusterChoice best;
  int64_t least = INT64_MAX;
  consider<8, false>(best, least, n, slabs, device);
  consider<8, true>(best, least, n, slabs, device);
  consider<4, false>(best, least, n, slabs, device);
  consider<4, true>(best, least, n, slabs, device);
  consider<2, false>(best, least, n, slabs, device);
  consider<2, true>(best, least, n, slabs, device);
  return best;
}

int64_t slabs_of(const InputGrad& p) {
  return int64_t{ceil_div(p.d, 256)} * ((p.grad[0].data != nullptr) + (p.grad[1].data != nullptr));
}

template <class T, bool WALK>
void launch_with(int cluster, const InputGrad& p, Stream stream) {
  if (cluster == 8) return launch_gram_grad<T, 8, WALK>(p, stream);
  if (cluster == 4) return launch_gram_grad<T, 4, WALK>(p, stream);
  return launch_gram_grad<T, 2, WALK>(p, stream);
}

template <class T>
void choose_gram_grad(const InputGrad& p, Stream stream) {
  const ClusterChoice choice = choose_cluster(p.n, slabs_of(p), stream.device);
  choice.walk ? launch_with<T, true>(choice.cluster, p, stream) : launch_with<T, false>(choice.cluster, p, stream);
}

}  // namespace

GramGradPlan plan_gram_grad(int n, int d, int device) {
  const int64_t slabs = 2LL * ceil_div(d, 256);
  if (!is_hopper(device) || n <= 128) return {};
  const ClusterChoice choice = choose_cluster(n, slabs, device);
  if (choice.cluster == 0 || !hopper_fills(device, choice.cluster, slabs)) return {};
  const int parts = ceil_div(ceil_div(n, 128), choice.cluster);
  return {choice.cluster, parts, static_cast<int>(ceil_div(slabs, int64_t{choice.at_once}))};
}

bool hopper_can_gram_grad(const InputGrad& p, int device) {
  if (!is_hopper(device) || p.n <= 128) return false;
  const int cluster = choose_cluster(p.n, slabs_of(p), device).cluster;
  return cluster > 0 && hopper_fills(device, cluster, slabs_of(p)) && has_tensor_map(p.hat[0]) &&
         has_tensor_map(p.hat[1]) && has_tensor_map(p.product) && hopper_can_finish(p);
}

void hopper_gram_grad(const InputGrad& p, Stream stream) {
  const DeviceGuard guard(stream.device);  // before the tensor maps, which need its context
  p.hat[0].dtype == DType::bfloat16 ? choose_gram_grad<bfloat16>(p, stream) : choose_gram_grad<float16>(p, stream);
}

}  // namespace barlow
