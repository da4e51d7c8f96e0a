// gram on Hopper: gram.h with hopper_multiply.h's product, half precision.
//
// The tiles that are stored and counted are gram.cu's, 128 x 128. There are two ways to compute them:
//
// * Many rows, more than 512: a cluster of two blocks computes 256 x 256 of K at a time, each block 128 rows of it, and
//   finishes those of its two tiles that are not above the diagonal. N = 2048, D = 8192, both views: 2 * 36 squares and
//   128 steps of 64 k, 1.125 times what the triangle needs; 66 clusters take at least 140 steps of 1024 cycles each.
// * Few rows: what fills the chip are slices of D, and whoever adds up many slices of a tile would work alone, after
//   the others. So a cluster of eight blocks computes a tile, each an eighth of a slice, and adds up its eight partial
//   tiles through distributed shared memory, always in the order of the blocks: each block two of the sixteen fragments
//   of every thread. These pieces of tiles are then stored, counted and completed on their own. N = 256, D = 8192: 3
//   tiles, both views, two slices, 96 blocks of 8 steps each; a piece's last phase reads four times 8 KiB, where one
//   block for the whole tile and as many blocks without clusters would read 32 times 64 KiB.
#include "blocks/hopper_multiply.h"
#include "kernels/gram.h"
#include "kernels/hopper_kernels.h"

namespace barlow {
namespace {

template <class Product_>
struct GramSquareJob {
  using Product = Product_;
  using Tile = ColumnsOf<Product, 128>;
  static constexpr int cluster = Product::CLUSTER;
  struct Params {
    TensorMap a[2], b[2];  // of each view
    Gram p;
    int squares, tiles;  // of the lower triangle: what a cluster computes, and 128 x 128
    int works;
  };
  static constexpr const char* name = "gram";
  static constexpr int epilogue_bytes = 512;
  static_assert(Product::N == cluster * 128, "a cluster computes a square");

  const Params& params;
  BARLOW_DEVICE explicit GramSquareJob(const Params& p) : params(p) {}

  // Squares run fastest: clusters that run together read the same columns of A_hat.
  BARLOW_DEVICE void place(int work, int& row, int& column, int& view, int& slice) const {
    lower_triangle_tile(work % params.squares, row, column);
    view = work / params.squares % 2;
    slice = work / (2 * params.squares);
    row = row * cluster + cluster_rank();
    column *= cluster;
  }

  BARLOW_DEVICE int steps(int slice) const {
    return smaller(params.p.steps, ceil_div(params.p.d, Product::K) - slice * params.p.steps);
  }

  BARLOW_DEVICE void produce(typename Product::Place& ring, int work) const {
    int row, column, view, slice;
    place(work, row, column, view, slice);
    if (lane() == 0) {
      Product::load(ring, {&params.a[view], &params.b[view], row * 128, column * 128,
                           slice * params.p.steps * Product::K, steps(slice)});
    }
  }

  BARLOW_DEVICE void consume(typename Product::Place& ring, int work) const {
    int row, column, view, slice;
    place(work, row, column, view, slice);
    typename Product::Accumulator acc;
    Product::multiply(ring, acc, steps(slice));
#pragma unroll
    for (int half = 0; half < cluster; ++half) {
      if (column + half <= row && row * 128 < params.p.n) {
        const int tile = row * (row + 1) / 2 + column + half;
        finish_gram<Tile>(params.p, params.tiles, tile, view, slice, row * 128, (column + half) * 128,
                          Tile::of(acc, half), Product::epilogue_memory());
      }
    }
  }
};

template <class T>
struct GramTileJob {
  using Product = HopperMultiply<T, 128, 4, 1, true, true>;
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

  // Tiles run fastest. This block's part of the slice may be empty.
  BARLOW_DEVICE void place(int work, int& tile, int& view, int& slice, int& first, int& steps) const {
    tile = work % params.tiles;
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
    Product::load(ring, {&params.a[view], &params.b[view], row * 128, column * 128, first * Product::K, steps});
  }

  BARLOW_DEVICE void consume(Place& ring, int work) {
    int tile, view, slice, first, steps, row, column;
    place(work, tile, view, slice, first, steps);
    lower_triangle_tile(tile, row, column);
    if (exchanges > 0) mbarrier_wait_cluster(&memory.read, (exchanges - 1) % 2);
    if (steps > 0) {
      typename Product::Accumulator acc;
      Product::multiply(ring, acc, steps);
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
    complete_gram<Product, cluster>(params.p, params.tiles, tile, piece, row * 128, column * 128,
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
void launch_gram(const Gram& p, Stream stream) {
  using Product = typename Job::Product;
  using Kernel = HopperKernel<Job>;
  const auto what = [&p] { return launch_name(Kernel::name, p.n, p.d); };
  typename Kernel::Params params{};
  params.p = p;
  const Matrix x[2] = {p.a_hat, p.b_hat};
  for (int view = 0; view < 2; ++view) {
    params.a[view] = Product::a_map(x[view], p.n, p.d, what);
    params.b[view] = Product::b_map(x[view], p.n, p.d, what);
  }
  const int rows = ceil_div(p.n, 128), square_rows = ceil_div(p.n, Product::N);
  params.tiles = rows * (rows + 1) / 2;
  const int squares = square_rows * (square_rows + 1) / 2;  // of the lower triangle: what a cluster computes
  if constexpr (Product::N > 128) params.squares = squares;
  params.works = 2 * squares * p.split;
  launch_clusters<Kernel>(params.works, stream, params, p.n, p.d);
}

template <class T>
using SquareJob = GramSquareJob<HopperMultiply<T, 256, 4, 2, true, true>>;

template <class T>
void choose_gram(const Gram& p, Stream stream) {
  if (p.n > hopper_gram_many_rows) {
    launch_gram<SquareJob<T>>(p, stream);
  } else {
    launch_gram<GramTileJob<T>>(p, stream);
  }
}

}  // namespace

int hopper_gram_clusters(int n, int device) {
  if (!is_hopper(device)) return 0;
  return n > hopper_gram_many_rows ? clusters_at_once<HopperKernel<SquareJob<bfloat16>>>(device)
                                   : clusters_at_once<HopperKernel<GramTileJob<bfloat16>>>(device);
}

bool hopper_can_gram(const Gram& p, int device) {
  return p.block == 128 && has_tensor_map(p.a_hat) && has_tensor_map(p.b_hat) && hopper_gram_clusters(p.n, device) > 0;
}

void hopper_gram(const Gram& p, Stream stream) {
  const DeviceGuard guard(stream.device);  // before the tensor maps, which need its context
  p.a_hat.dtype == DType::bfloat16 ? choose_gram<bfloat16>(p, stream) : choose_gram<float16>(p, stream);
}

}  // namespace barlow
