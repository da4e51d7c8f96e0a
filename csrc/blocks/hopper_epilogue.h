// hopper_epilogue.h: how the input gradients' epilogue runs beside the next tile's product.
//
// wgmma leaves P in the consumers' registers, where the next product wants to go. So the consumers round it to half
// precision, put it into shared memory and go on; the finishers, the producer's three neighbours, make the gradient:
//
//     consumers    product 0 | put 0 | product 1         | put 1 | product 2 ...
//     finishers                      | finish 0 |                | finish 1 |
//
// * The tile lies there as boxes of 128 rows by 64 columns, swizzled as the TMA would: a consumers' thread has two
//   rows, g and g + 8, and of each fragment of 8 columns two, 2 t and 2 t + 1 (lane = 4 g + t), and eight rows of 16
//   bytes fall into eight different groups of banks.
// * There is room for one tile. `given` and `taken` are the two sides' turns: nobody puts a tile before the last one
//   has been taken. As long as finishing takes less than a product, nobody waits.
// * A finishers' warp takes every third row, a lane eight neighbouring columns of it. So what belongs to a feature
//   stays in registers, and own, other and the gradient are whole rows of 512 bytes, read up to eight rows ahead.
// * Beside the last tile there is no product: the consumers help, and a warp takes every eleventh row.
//
// What it costs: P's rounding, 2^-9 in bfloat16, as much as the gradient's own, and a stage of the ring.
#pragma once

#include <type_traits>

#include "blocks/hopper_multiply.h"
#include "blocks/input_grad.h"

namespace barlow {

constexpr int box_fragments = box_columns / 8;

// Where this thread's two numbers of fragment j lie, in the first (h = 0) or second of its rows. One register serves
// all fragments: j only flips bits of it.
BARLOW_DEVICE uint32_t* in_box(char* box, int j, int h) {
  const int g = lane() / 4, first = (warp() * 16 + g) * 128 + g * 16 + lane() % 4 * 4;
  return reinterpret_cast<uint32_t*>(box + (first ^ j * 16) + h * 8 * 128);
}

template <class T>
BARLOW_DEVICE void unpack_two(uint32_t both, float (&x)[2]) {
  x[0] = to_float(T{static_cast<uint16_t>(both & 0xffff)});
  x[1] = to_float(T{static_cast<uint16_t>(both >> 16)});
}

// The tile of P between the two sides. Each has an object of its own, which counts tiles.
template <class Product>
struct HandOver {
  using T = typename Product::T;
  static constexpr int boxes = Product::N / box_columns;
  struct Memory {
    alignas(128) char p[boxes][Product::M * 128];
    uint64_t given, taken;
  };
  // What is put is P times this. float16 ends at 65504: P, at most N^1.5, would pass that from N = 1600 on.
  static constexpr float scale = std::is_same<T, float16>::value ? 1.f / 64 : 1.f;

  Memory& memory;
  int tiles = 0;

  // By all threads, before they meet.
  BARLOW_DEVICE explicit HandOver(Memory& m) : memory(m) {
    if (thread() == 0) {
      mbarrier_init(&memory.given, Consumers::threads / 32);
      mbarrier_init(&memory.taken, Finishers::threads / 32);
    }
  }

  // The consumers' side, in this order.
  BARLOW_DEVICE void wait_for_room() const { mbarrier_wait(&memory.taken, tiles % 2 ^ 1); }
  BARLOW_DEVICE void put(const typename Product::Accumulator& acc, int box) const {
#pragma unroll
    for (int j = 0; j < box_fragments; ++j) {
      const float (&x)[4] = acc[0][box * box_fragments + j];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        *in_box(memory.p[box], j, h) = pack_two<T>(x[2 * h] * scale, x[2 * h + 1] * scale);
      }
    }
  }
  BARLOW_DEVICE void give() {
    warp_barrier();
    if (lane() == 0) mbarrier_arrive(&memory.given);
    ++tiles;
  }

  // The finishers' side.
  BARLOW_DEVICE void wait_for_tile() const { mbarrier_wait(&memory.given, tiles % 2); }
  // The consumers, when they help.
  BARLOW_DEVICE void wait_for_last_tile() const { mbarrier_wait(&memory.given, (tiles - 1) % 2); }
  // Eight numbers of a row: columns 8 lane and following.
  BARLOW_DEVICE void get(int row, float (&x)[8]) const {
    const char* const from = memory.p[lane() / 8] + row * 128 + (lane() % 8 ^ row % 8) * 16;
    unpack(load(reinterpret_cast<const Vec16*>(from)), x, T{});
  }
  BARLOW_DEVICE void take() {
    warp_barrier();
    if (lane() == 0) mbarrier_arrive(&memory.taken);
    ++tiles;
  }
};

// A warp's rows of a tile.
struct RowShare {
  int first, step;
};
BARLOW_DEVICE RowShare finishers_share(bool helped) {
  return {Finishers::warp(), helped ? Everyone::threads / 32 : Finishers::threads / 32};
}
BARLOW_DEVICE RowShare helpers_share() { return {Finishers::threads / 32 + warp(), Everyone::threads / 32}; }

// A thread makes, of two matrices' rows of a tile, a third's. Reads are under way `ahead` rows ahead: as many as its
// registers hold.
template <class T, int ahead>
struct FinishedRows {
  RowShare share;
  int rows;  // of this warp that exist, where this lane's columns do
  int64_t x_step, y_step, to_step;
  const T *next_x, *next_y;
  T* to;
  Vec16 ahead_x[ahead], ahead_y[ahead];

  // From `row` and `column` on.
  BARLOW_DEVICE FinishedRows(const Matrix& x, const Matrix& y, const Matrix& out, const InputGrad& p, RowShare share,
                             int row, int column)
      : share(share) {
    rows = column + lane() * 8 < p.d ? ceil_div(smaller(128, p.n - row) - share.first, share.step) : 0;
    next_x = first(x, row, column);
    next_y = first(y, row, column);
    to = first(out, row, column);
    x_step = share.step * x.row_stride;
    y_step = share.step * y.row_stride;
    to_step = share.step * out.row_stride;
#pragma unroll
    for (int s = 0; s < ahead; ++s) {
      if (s < rows) read(s);
    }
  }

  // f(row of the tile, eight numbers of x, of y, where to leave those of out)
  template <class F>
  BARLOW_DEVICE void each(F f) {
#pragma unroll 1
    for (int begin = 0; begin < rows; begin += ahead) {
#pragma unroll
      for (int s = 0; s < ahead; ++s) {
        float a[8], b[8], g[8];
        unpack(ahead_x[s], a, T{});
        unpack(ahead_y[s], b, T{});
        if (begin + s + ahead < rows) read(s);
        if (begin + s < rows) {
          f(share.first + share.step * (begin + s), a, b, g);
          store(reinterpret_cast<Vec16*>(to), pack(g, T{}));
        }
        to += to_step;
      }
    }
  }

 private:
  BARLOW_DEVICE T* first(const Matrix& m, int row, int column) const {
    return static_cast<T*>(m.data) + (row + share.first) * m.row_stride + column + lane() * 8;
  }
  BARLOW_DEVICE void read(int s) {
    ahead_x[s] = load(reinterpret_cast<const Vec16*>(next_x));
    ahead_y[s] = load(reinterpret_cast<const Vec16*>(next_y));
    next_x += x_step;
    next_y += y_step;
  }
};

// x[2 j + e]: a thread's numbers of column 2 t + e of fragment j. Leaves the sums over the warp's rows in x[0], x[1],
// of columns 2 lane and 2 lane + 1 of the eight fragments: lanes exchange halves of what they have, so 14 shuffles do.
BARLOW_DEVICE void sum_columns(float (&x)[2 * box_fragments]) {
#pragma unroll
  for (int round = 0; round < 3; ++round) {
    const int half = box_fragments >> round, mask = 16 >> round;
    const bool upper = (lane() & mask) != 0;
#pragma unroll
    for (int i = 0; i < box_fragments; ++i) {
      if (i >= half) break;
      const float given = upper ? x[i] : x[i + half], kept = upper ? x[i + half] : x[i];
      x[i] = kept + shuffle_xor(given, mask);
    }
  }
}

// Whether a gradient's matrices are what the finishers read and write: rows of whole 16 bytes.
inline bool hopper_can_finish(const InputGrad& p) {
  for (int view = 0; view < 2; ++view) {
    if (!has_vectors(p.own[view]) || p.own[view].dtype != p.hat[view].dtype) return false;
    const Matrix& grad = p.grad[view];
    if (grad.data != nullptr && (!has_vectors(grad) || grad.dtype != p.hat[view].dtype)) return false;
  }
  return p.d % 8 == 0;
}

}  // namespace barlow
