// gram_grad on Hopper: gram_grad.h with hopper_multiply.h's product and hopper_epilogue.h, half precision.
//
// A cluster of 2, 4 or 8 blocks owns a slab of 256 features with all N rows: each block computes row tiles of 128 of P,
// all of them share the tile of A_hat (or B_hat), of which each fetches a part. Where every block has one row tile, P
// waits in registers while the blocks add up their sums of own q through distributed shared memory, always in the order
// of the blocks: the gradient is stored once, and no second walk over memory is needed. Else a block walks over its row
// tiles, and over what it has stored, as gram_grad.h says. A slab of 2048 rows is 1 MiB of the gradient and 1 MiB of
// own: the 33 clusters of 4 that run at once find 66 MiB of them, more than half still in L2.
//
// The cluster is chosen by how long all slabs take. Fewer blocks leave fewer row tiles empty (1100 rows are 9 tiles: 10
// with clusters of 2, 16 with clusters of 8) and fill the chip better: it holds 15 clusters of 8, 33 of 4, 66 of 2.
#include "blocks/hopper_epilogue.h"
#include "kernels/gram_grad.h"
#include "kernels/hopper_kernels.h"

namespace barlow {
namespace {

template <class T, int CLUSTER, bool WALK>
struct GramGradJob {
  using Product = HopperMultiply<T, 256, 4, CLUSTER, true, false>;
  using Place = typename Product::Place;
  static constexpr int cluster = Product::CLUSTER;
  struct Params {
    TensorMap k[2], hat[2], own[2];  // of each view: K of the other, and itself
    InputGrad p;
    EpilogueMatrices m[2];
    int first_view, views, parts;  // row tiles of a block
    float by_n;                    // 1 / N
    int works;
  };
  // grad = p P + (y Y + (x X + offset)), own = scale X + offset_own: of each feature. Until the sums are complete, x and
  // offset lack what only they tell of the multiple of own.
  enum { of_p, of_y, of_x, of_offset, of_scale, of_offset_own, weight_count };
  struct Memory {
    float weights[weight_count][Product::N];
    float sums[Consumers::threads / 32][Product::N];  // of own P: each warp's rows
    float totals[2][Product::N];                      // all of this block's rows; this slab's and the next one's
    uint64_t exchanged;                               // every block of the cluster has written its totals
  };
  static constexpr const char* name = "gram_grad";
  static constexpr int epilogue_bytes = sizeof(Memory);
  static constexpr int chunks = Product::N / box_columns;

  const Params& params;
  Memory& memory;
  int exchanges = 0;

  BARLOW_DEVICE explicit GramGradJob(const Params& p)
      : params(p), memory(*reinterpret_cast<Memory*>(Product::epilogue_memory())) {
    if (thread() == 0) mbarrier_init(&memory.exchanged, CLUSTER);
  }

  // Both views of a slab after each other: they read the same inputs.
  BARLOW_DEVICE int view_of(int work) const { return params.first_view + work % params.views; }
  BARLOW_DEVICE int column_of(int work) const { return work / params.views * Product::N; }
  BARLOW_DEVICE int row_of(int part) const { return (part * CLUSTER + cluster_rank()) * Product::M; }
  BARLOW_DEVICE int steps() const { return ceil_div(params.p.n, Product::K); }

  BARLOW_DEVICE void produce(Place& ring, int work) const {
    if (lane() != 0) return;
    const int view = view_of(work), column = column_of(work);
    const bool sums = params.p.normalized;
    const TensorMap &own = params.own[view], &other = params.own[1 - view];
    for (int part = 0; part < params.parts; ++part) {
      Product::load(ring, {&params.k[view], &params.hat[view], row_of(part), column, 0, steps()});
      for (int c = 0; c < chunks && (WALK || sums); ++c) {
        Product::load_boxes(ring, own, WALK ? &other : nullptr, row_of(part), column + c * box_columns);
      }
    }
    if (WALK && !sums) return;
    for (int part = 0; part < params.parts; ++part) {
      for (int c = 0; c < chunks; ++c) {
        Product::load_boxes(ring, own, WALK ? nullptr : &other, row_of(part), column + c * box_columns);
      }
    }
  }

  BARLOW_DEVICE void consume(Place& ring, int work) {
    const InputGrad& p = params.p;
    const int view = view_of(work), column = column_of(work);
    const EpilogueMatrices& m = params.m[view];
    GramWeights<1> w;  // of this thread's feature: on its way while the product is made
    w.set(p, view, column + thread());
    typename Product::Accumulator acc;
    for (int part = 0; part < params.parts; ++part) {
      Product::multiply(ring, acc, steps());
      if (part == 0) {
        Consumers::barrier();  // the last slab's weights have been read
        store_weights(w, 0.f);
        Consumers::barrier();
      }
      if (WALK || p.normalized) {
#pragma unroll
        for (int c = 0; c < chunks; ++c) {
          char* const boxes = Product::wait(ring);
          add_own(boxes, acc, c, part == 0);
          if (WALK) finish(boxes, acc, m, c, row_of(part), column);
          Product::done(ring);
        }
      }
      if (!WALK) break;  // tells the compiler that there is no next part
    }
    if (p.normalized) {
      add_up(w);
    } else if (WALK) {
      return;
    }
    for (int part = 0; part < params.parts; ++part) {
#pragma unroll
      for (int c = 0; c < chunks; ++c) {
        char* const boxes = Product::wait(ring);
        if constexpr (WALK) {
          add_to_stored(boxes, m, c, row_of(part) + warp() * 16, column + c * box_columns);
        } else {
          finish(boxes, acc, m, c, row_of(part), column);
        }
        Product::done(ring);
      }
      if (!WALK) break;
    }
  }

  // x: what the sums tell of the factor of own.
  BARLOW_DEVICE void store_weights(const GramWeights<1>& w, float x) const {
    const float own = w.w.weight_x[0] + x;
    float* const to = &memory.weights[0][thread()];
    to[of_p * Product::N] = w.w.weight_p[0];
    to[of_y * Product::N] = w.w.weight_y[0];
    to[of_x * Product::N] = own * w.w.scale_x[0];
    to[of_offset * Product::N] = own * w.w.offset_x[0] + w.w.offset_y[0];
    to[of_scale * Product::N] = w.w.scale_x[0];
    to[of_offset_own * Product::N] = w.w.offset_x[0];
  }
  // One weight of the two features of a fragment that this thread has.
  BARLOW_DEVICE void load_weights(int which, int fragment, float (&w)[2]) const {
    load_two(&memory.weights[which][Product::column_of(fragment)], w);
  }

  // The sums of own P over this warp's rows. Rows and columns that do not exist are 0 in P.
  BARLOW_DEVICE void add_own(char* boxes, const typename Product::Accumulator& acc, int c, bool first) {
    float sums[2 * box_fragments];
#pragma unroll
    for (int j = 0; j < box_fragments; ++j) {
      const int fragment = c * box_fragments + j;
      float scale[2], offset[2];
      load_weights(of_scale, fragment, scale);
      load_weights(of_offset_own, fragment, offset);
      sums[2 * j] = sums[2 * j + 1] = 0.f;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float x[2];
        unpack_two<T>(*in_box(boxes + Product::x_box, j, h), x);
#pragma unroll
        for (int e = 0; e < 2; ++e) sums[2 * j + e] += (x[e] * scale[e] + offset[e]) * acc[0][fragment][2 * h + e];
      }
    }
    sum_columns(sums);
    float* const to = memory.sums[warp()] + c * box_columns + 2 * lane();
    to[0] = first ? sums[0] : to[0] + sums[0];
    to[1] = first ? sums[1] : to[1] + sums[1];
  }

  // The sums of own P over all rows of the slab, and what follows from them: of mean_n(own q), only this was not known.
  BARLOW_DEVICE void add_up(const GramWeights<1>& w) {
    float* const totals = memory.totals[exchanges % 2];
    Consumers::barrier();
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < Consumers::threads / 32; ++i) sum += memory.sums[i][thread()];
    totals[thread()] = sum;
    Consumers::barrier();
    if (thread() < CLUSTER) mbarrier_arrive_cluster(&memory.exchanged, thread());
    mbarrier_wait_cluster(&memory.exchanged, exchanges % 2);
    sum = 0.f;
#pragma unroll
    for (int rank = 0; rank < CLUSTER; ++rank) sum += load_from_block(totals + thread(), rank);
    // Nobody writes these totals again before everybody has read them: the exchange of the next ones lies between.
    ++exchanges;
    const float x = -w.kappa[0] * w.w.weight_p[0] * (sum * params.by_n);
    if constexpr (WALK) {
      memory.weights[of_x][thread()] = x * w.w.scale_x[0];
      memory.weights[of_offset][thread()] = x * w.w.offset_x[0];
    } else {
      store_weights(w, x);
    }
    Consumers::barrier();
  }

  // The gradient of 64 columns, which takes the place of X in the box and goes to memory. With WALK, but for what the
  // sums tell.
  BARLOW_DEVICE void finish(char* boxes, const typename Product::Accumulator& acc, const EpilogueMatrices& m, int c,
                            int first_row, int first_column) const {
#pragma unroll
    for (int j = 0; j < box_fragments; ++j) {
      const int fragment = c * box_fragments + j;
      float p[2], y[2], x[2], offset[2];
      load_weights(of_p, fragment, p);
      load_weights(of_y, fragment, y);
      load_weights(of_x, fragment, x);
      load_weights(of_offset, fragment, offset);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float own[2], other[2];
        unpack_two<T>(*in_box(boxes + Product::x_box, j, h), own);
        unpack_two<T>(*in_box(boxes + Product::y_box, j, h), other);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          own[e] = p[e] * acc[0][fragment][2 * h + e] + (y[e] * other[e] + (x[e] * own[e] + offset[e]));
        }
        *in_box(boxes + Product::x_box, j, h) = pack_two<T>(own[0], own[1]);
      }
    }
    store_box<T>(boxes + Product::x_box, m.grad, m.grad_vectors, params.p.n, params.p.d, first_row + warp() * 16,
                 first_column + c * box_columns);
  }

  // The gradient waits in memory; each thread reads what it has stored itself.
  BARLOW_DEVICE void add_to_stored(const char* box, const EpilogueMatrices& m, int c, int first_row, int column) const {
    const InputGrad& p = params.p;
    const int chunk = lane() % 8;
    const float* const x = memory.weights[of_x] + c * box_columns + chunk * 8;
    const float* const offset = memory.weights[of_offset] + c * box_columns + chunk * 8;
    column += chunk * 8;
    const int count = larger(0, smaller(8, p.d - column));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = i * 4 + lane() / 8;
      if (first_row + r >= p.n || count == 0) continue;
      const char* const own = box + (warp() * 16 + r) * 128 + (chunk ^ (r & 7)) * 16;
      T* const to = static_cast<T*>(m.grad.data) + static_cast<int64_t>(first_row + r) * m.grad.row_stride +
                    column * m.grad.column_stride;
      if (m.grad_vectors && count == 8) {
        float z[8], g[8];
        unpack(load(reinterpret_cast<const Vec16*>(own)), z, T{});
        unpack(load(reinterpret_cast<const Vec16*>(to)), g, T{});
#pragma unroll
        for (int e = 0; e < 8; ++e) g[e] += x[e] * z[e] + offset[e];
        store(reinterpret_cast<Vec16*>(to), pack(g, T{}));
      } else {
#pragma unroll 1
        for (int e = 0; e < count; ++e) {
          T* const g = to + e * m.grad.column_stride;
          const float z = to_float(load(reinterpret_cast<const T*>(own) + e));
          *g = from_float<T>(to_float(load(g)) + (x[e] * z + offset[e]));
        }
      }
    }
  }
};

template <class T, int CLUSTER, bool WALK>
void launch_gram_grad(const InputGrad& p, Stream stream) {
  using Job = GramGradJob<T, CLUSTER, WALK>;
  using Kernel = HopperKernel<Job>;
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
    params.own[view] = tensor_map(p.own[view], p.n, p.d, Job::Product::M, what);
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
  const int at_once = clusters_at_once<HopperKernel<GramGradJob<bfloat16, CLUSTER, WALK>>>(device);
  if (at_once == 0 || WALK != (parts > 1)) return;
  // A row tile takes its steps, and about as long as 7 more for its epilogue, or 10 where it walks twice.
  const int64_t time = ceil_div(slabs, int64_t{at_once}) * parts * (ceil_div(n, 64) + (WALK ? 10 : 7));
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
