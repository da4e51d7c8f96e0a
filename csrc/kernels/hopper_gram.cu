// gram on Hopper: gram.h with hopper_multiply.h's product, half precision.
//
// There are two ways to compute the tiles:
//
// * Many rows, more than 256: a cluster of two blocks computes 256 x 256 of K at a time, each block 128 rows of it. N =
//   2048, D = 8192, both views: 2 * 36 squares and 128 steps of 64 k, 1.125 times what the triangle needs. All clusters
//   take as many steps, whatever the number of squares: 66 of them 140, of 1024 cycles each. Which cluster has which part
//   of a square depends on the device and on the shape alone, and so does the order of the additions.
// * Few rows: what fills the chip are slices of D, and whoever adds up many slices of a tile would work alone, after
//   the others. So a cluster of eight blocks computes a tile, each an eighth of a slice, and adds up its eight partial
//   tiles through distributed shared memory, always in the order of the blocks: each block two of the sixteen fragments
//   of every thread. These pieces of tiles are then stored, counted and completed on their own. N = 256, D = 8192: 3
//   tiles, both views, two slices, 96 blocks of 8 steps each; a piece's last phase reads four times 8 KiB, where one
//   block for the whole tile and as many blocks without clusters would read 32 times 64 KiB. Tiles on the diagonal, two
//   of three there and all up to 128 rows, load their rows once: 120 multiprocessors that load every tile's rows twice
//   would ask L2 for 9 TB/s. Up to 64 rows the only tile has 64 columns; the 64 rows below it are the TMA's zeros.
#include "blocks/hopper_multiply.h"
#include "kernels/gram.h"
#include "kernels/hopper_kernels.h"

namespace barlow {
namespace {

// How K's squares of 256 are shared out. All (square, view, step of 64 k), in this order, form one line of `total` steps;
// each cluster takes `range` of them, the last one what is left. So a square's sum over k is cut where the clusters'
// ranges are cut, into two or three segments mostly: segment c of line `2 square + view` is what cluster c has of it, and
// its partial tile has the number line + c.
struct SquareLayout {
  int squares, steps;  // of a line
  int range, clusters, total;
  BARLOW_HOST_DEVICE int first_cluster(int line) const { return line * steps / range; }
  BARLOW_HOST_DEVICE int last_cluster(int line) const { return ((line + 1) * steps - 1) / range; }
  int64_t partial_tiles() const { return 2LL * squares + clusters; }
};

SquareLayout square_layout(int n, int d, int clusters) {
  const int rows = ceil_div(n, 256);
  SquareLayout layout{};
  layout.squares = rows * (rows + 1) / 2;
  layout.steps = ceil_div(d, 64);
  layout.total = 2 * layout.squares * layout.steps;
  // Fewer clusters where each would have less than 8 steps: a segment's tile takes about as long to hand over.
  layout.range = larger(smaller(8, layout.total), ceil_div(layout.total, clusters));
  layout.clusters = ceil_div(layout.total, layout.range);
  return layout;
}
// Steps are counted in 32 bits. More are for the portable kernel, as large as no memory is.
bool has_square_layout(int n, int d) {
  const int64_t rows = ceil_div(n, 256);
  return rows * (rows + 1) * ceil_div(d, 64) < INT32_MAX;
}

template <class Product_>
struct GramSquareJob {
  using Product = Product_;
  static constexpr int cluster = Product::CLUSTER;
  struct Params {
    TensorMap a[2], b[2];  // of each view
    Gram p;
    SquareLayout layout;
    int works;  // a cluster's range
  };
  static constexpr const char* name = "gram";
  static constexpr int epilogue_bytes = 512;
  static constexpr int most_steps = 128;  // in the tensor cores' sum, which truncates: 8192 products
  static_assert(Product::N == cluster * Product::M, "a cluster computes a square");

  const Params& params;
  BARLOW_DEVICE explicit GramSquareJob(const Params& p) : params(p) {}

  struct Segment {
    int line, first, steps;  // of a line
    int row, column;         // of this block's 128 x 256
  };
  // The segment that begins at `at`.
  BARLOW_DEVICE Segment segment(int at, int stop) const {
    const SquareLayout& layout = params.layout;
    Segment s;
    s.line = at / layout.steps;
    s.first = at - s.line * layout.steps;
    s.steps = smaller(layout.steps - s.first, stop - at);
    lower_triangle_tile(s.line / 2, s.row, s.column);
    s.row = (s.row * cluster + cluster_rank()) * Product::M;
    s.column *= Product::N;
    return s;
  }
  BARLOW_DEVICE int begin_of(int work) const { return work * params.layout.range; }
  BARLOW_DEVICE int end_of(int work) const {
    return work + 1 < params.layout.clusters ? begin_of(work + 1) : params.layout.total;
  }

  BARLOW_DEVICE void produce(typename Product::Place& ring, int work) const {
    if (lane() != 0) return;
    for (int at = begin_of(work), stop = end_of(work); at < stop;) {
      const Segment s = segment(at, stop);
      const int view = s.line % 2;
      Product::load(ring, {&params.a[view], &params.b[view], s.row, s.column, s.first * Product::K, s.steps});
      at += s.steps;
    }
  }

  BARLOW_DEVICE void consume(typename Product::Place& ring, int work) const {
    for (int at = begin_of(work), stop = end_of(work); at < stop;) {
      const Segment s = segment(at, stop);
      for (int done = 0; done < s.steps; done += most_steps) {
        typename Product::Accumulator acc;
        Product::multiply(ring, acc, smaller(most_steps, s.steps - done));
        add_to_partial(partial_tile(s.line + work), acc, done > 0);
      }
      finish(s);
      at += s.steps;
    }
  }

  // This thread's numbers of a partial tile, of this block's half of it; fragments lie Consumers::threads apart.
  BARLOW_DEVICE Vec16* partial_tile(int id) const {
    return reinterpret_cast<Vec16*>(params.p.partials) +
           (static_cast<int64_t>(id) * cluster + cluster_rank()) * (Product::COLUMNS * Consumers::threads) + thread();
  }

  // Long sums go on in memory, where the tensor cores' sum is added, rounded. Nobody else reads them yet.
  BARLOW_DEVICE static void add_to_partial(Vec16* to, const typename Product::Accumulator& acc, bool add) {
    constexpr int batch = 8;
#pragma unroll
    for (int f = 0; f < Product::COLUMNS; f += batch) {
      Vec16 before[batch];
#pragma unroll
      for (int i = 0; i < batch; ++i) before[i] = add ? load_from_l2(to + (f + i) * Consumers::threads) : Vec16{};
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        float sum[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[e] = bits_to_float(before[i].word[e]) + acc[0][f + i][e];
        store(to + (f + i) * Consumers::threads, pack(sum, 0.f));
      }
    }
  }

  // A block's half of a square is a part that is counted on its own: whoever comes last adds up both views' segments.
  BARLOW_DEVICE void finish(const Segment& s) const {
    const Gram& p = params.p;
    const SquareLayout& layout = params.layout;
    char* const shared = Product::epilogue_memory();
    const int square = s.line / 2, id = square * cluster + cluster_rank();
    Slices views[2];
    int segments = 0;
#pragma unroll
    for (int view = 0; view < 2; ++view) {
      const int line = 2 * square + view, first = layout.first_cluster(line);
      views[view] = {partial_tile(line + first), layout.last_cluster(line) - first + 1};
      segments += views[view].count;
    }
    if (!last_to_arrive<Consumers>(p.counters + id, segments, reinterpret_cast<int*>(shared))) return;
    // Columns beyond this block's rows are above the diagonal.
    const int columns = smaller(Product::N, s.row + Product::M - s.column);
    const int end = s.row < p.n ? smaller(columns, p.n - s.column) : 0;
    const int64_t stride = cluster * Product::COLUMNS * Consumers::threads;
    const double sum =
        add_slices<Product, Product::COLUMNS>(p, views, stride, 0, larger(0, ceil_div(end, 8)), s.row, s.column);
    complete_gram<Consumers>(p, id, layout.squares * cluster, sum, shared);
  }
};

template <class T, int COLUMNS>
struct GramTileJob {
  using Product = HopperMultiply<T, COLUMNS, 4, 1, true, true>;
  using Place = typename Product::Place;
  static constexpr int cluster = hopper_gram_pieces, fragments = Product::COLUMNS / cluster;
  struct Params {
    TensorMap a[2], b[2];  // of each view
    Gram p;
    int tiles;
    int works;
  };
  struct Memory {
    Vec16 tile[Product::COLUMNS][Consumers::threads];  // this block's
    double scratch[64];
    uint64_t written, read;  // every block's tile
  };
  static constexpr const char* name = "gram";
  static constexpr int epilogue_bytes = sizeof(Memory);

  const Params& params;
  Memory& memory;
  int exchanges = 0;

  BARLOW_DEVICE explicit GramTileJob(const Params& p)
      : params(p), memory(*reinterpret_cast<Memory*>(Product::epilogue_memory())) {
    if (thread() == 0) {
      mbarrier_init(&memory.written, cluster);
      mbarrier_init(&memory.read, cluster);
    }
  }

  // Tiles run fastest, and begin with another one each time that all clusters have taken a work: none has only tiles
  // beside the diagonal, which take longer. This block's part of the slice may be empty.
  BARLOW_DEVICE void place(int work, int& tile, int& view, int& slice, int& first, int& steps) const {
    const int clusters = grid_size() / cluster, turn = clusters % params.tiles == 0 ? work / clusters : 0;
    tile = (work + turn) % params.tiles;
    view = work / params.tiles % 2;
    slice = work / (2 * params.tiles);
    const int per_block = ceil_div(params.p.steps, cluster), begin = cluster_rank() * per_block;
    const int all = smaller(params.p.steps, ceil_div(params.p.d, Product::K) - slice * params.p.steps);
    first = slice * params.p.steps + begin;
    steps = larger(0, smaller(per_block, all - begin));
  }

  BARLOW_DEVICE void produce(Place& ring, int work) const {
    int tile, view, slice, first, steps, row, column;
    place(work, tile, view, slice, first, steps);
    lower_triangle_tile(tile, row, column);
    if (lane() != 0) return;
    Product::load(
        ring, {&params.a[view], &params.b[view], row * 128, column * 128, first * Product::K, steps, row == column});
  }

  BARLOW_DEVICE void consume(Place& ring, int work) {
    int tile, view, slice, first, steps, row, column;
    place(work, tile, view, slice, first, steps);
    lower_triangle_tile(tile, row, column);
    if (exchanges > 0) mbarrier_wait_cluster(&memory.read, (exchanges - 1) % 2);
    if (steps > 0) {
      typename Product::Accumulator acc;
      Product::multiply(ring, acc, steps, row == column);
#pragma unroll
      for (int f = 0; f < Product::COLUMNS; ++f) store(&memory.tile[f][thread()], pack(acc[0][f], 0.f));
    } else {
      for (int f = 0; f < Product::COLUMNS; ++f) store(&memory.tile[f][thread()], Vec16{});
    }
    meet(&memory.written);

    const int piece = cluster_rank();
    Vec16* const to = partial_tile<Product>(params.p, params.tiles, tile, view, slice);
#pragma unroll
    for (int i = 0; i < fragments; ++i) {
      const int f = piece * fragments + i;
      float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int rank = 0; rank < cluster; ++rank) {
        const Vec16 v = load_from_block(&memory.tile[f][thread()], rank);
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[e] += bits_to_float(v.word[e]);
      }
      store(to + f * Consumers::threads, pack(sum, 0.f));
    }
    arrive(&memory.read);
    ++exchanges;
    finish_piece<Product, cluster>(params.p, params.tiles, tile, piece, row * 128, column * 128,
                                   reinterpret_cast<char*>(memory.scratch));
  }

  // All consumers of the cluster.
  BARLOW_DEVICE void arrive(uint64_t* barrier) const {
    Consumers::barrier();
    if (thread() < cluster) mbarrier_arrive_cluster(barrier, thread());
  }
  BARLOW_DEVICE void meet(uint64_t* barrier) const {
    arrive(barrier);
    mbarrier_wait_cluster(barrier, exchanges % 2);
  }
};

template <class Job>
typename Job::Params gram_params(const Gram& p) {
  using Product = typename Job::Product;
  const auto what = [&p] { return launch_name(Job::name, p.n, p.d); };
  typename Job::Params params{};
  params.p = p;
  const Matrix x[2] = {p.a_hat, p.b_hat};
  for (int view = 0; view < 2; ++view) {
    params.a[view] = Product::a_map(x[view], p.n, p.d, what);
    params.b[view] = Product::b_map(x[view], p.n, p.d, what);
  }
  return params;
}

template <class T>
using SquareJob = GramSquareJob<HopperMultiply<T, 256, 4, 2, true, true>>;

template <class Job>
void launch_tiles(const Gram& p, Stream stream) {
  typename Job::Params params = gram_params<Job>(p);
  const int rows = ceil_div(p.n, 128);
  params.tiles = rows * (rows + 1) / 2;
  params.works = 2 * params.tiles * p.split;
  launch_clusters<HopperKernel<Job>>(params.works, stream, params, p.n, p.d);
}

template <class T>
void choose_gram(const Gram& p, Stream stream) {
  if (p.n > hopper_gram_many_rows) {
    using Job = SquareJob<T>;
    typename Job::Params params = gram_params<Job>(p);
    params.layout = square_layout(p.n, p.d, hopper_gram_clusters(p.n, p.d, stream.device));
    params.works = params.layout.clusters;
    launch_clusters<HopperKernel<Job>>(params.works, stream, params, p.n, p.d);
  } else if (p.n > hopper_gram_narrow_rows) {
    launch_tiles<GramTileJob<T, 128>>(p, stream);
  } else {
    launch_tiles<GramTileJob<T, 64>>(p, stream);
  }
}

}  // namespace

int hopper_gram_clusters(int n, int d, int device) {
  if (!is_hopper(device) || (n > hopper_gram_many_rows && !has_square_layout(n, d))) return 0;
  if (n > hopper_gram_many_rows) return clusters_at_once<HopperKernel<SquareJob<bfloat16>>>(device);
  return n > hopper_gram_narrow_rows ? clusters_at_once<HopperKernel<GramTileJob<bfloat16, 128>>>(device)
                                     : clusters_at_once<HopperKernel<GramTileJob<bfloat16, 64>>>(device);
}

GramPlan hopper_plan_squares(int n, int d, int clusters) {
  const SquareLayout layout = square_layout(n, d, clusters);
  GramPlan plan{};
  plan.block = 128;
  plan.tiles = 2 * layout.squares;
  plan.split = 1;
  plan.steps = layout.range;
  plan.partials = layout.partial_tiles() * 256 * 256;
  return plan;
}

bool hopper_can_gram(const Gram& p, int device) {
  return has_tensor_map(p.a_hat) && has_tensor_map(p.b_hat) && hopper_gram_clusters(p.n, p.d, device) > 0;
}

void hopper_gram(const Gram& p, Stream stream) {
  const DeviceGuard guard(stream.device);  // before the tensor maps, which need its context
  p.a_hat.dtype == DType::bfloat16 ? choose_gram<bfloat16>(p, stream) : choose_gram<float16>(p, stream);
}

}  // namespace barlow
