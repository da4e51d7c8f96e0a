// hopper_epilogue.h: what the input gradients do with a tile of P that wgmma has left in registers.
//
// A thread has two rows, g and g + 8, and of each fragment of 8 columns two, 2 t and 2 t + 1 (lane = 4 g + t). What the
// epilogue reads, the producer has loaded into the ring while the product was still running: boxes of 128 rows by 64
// columns, swizzled. A warp reads its fragments from there, eight rows of 16 bytes at a time in eight different groups
// of banks, and puts its results in their place; then it reads whole rows of 128 bytes and stores those.
//
// So a warp handles 16 rows by 64 columns, eight fragments, at a time, and needs no other warp.
#pragma once

#include "blocks/hopper_multiply.h"
#include "blocks/input_grad.h"

namespace barlow {

constexpr int box_fragments = box_columns / 8;

// Where this thread's two numbers of fragment j lie, in the first (h = 0) or second of its rows.
BARLOW_DEVICE uint32_t* in_box(char* box, int j, int h) {
  const int g = lane() / 4;
  return reinterpret_cast<uint32_t*>(box + (warp() * 16 + h * 8 + g) * 128 + (j ^ g) * 16 + lane() % 4 * 4);
}

template <class T>
BARLOW_DEVICE void unpack_two(uint32_t both, float (&x)[2]) {
  x[0] = to_float(T{static_cast<uint16_t>(both & 0xffff)});
  x[1] = to_float(T{static_cast<uint16_t>(both >> 16)});
}

// Two neighbouring numbers, aligned to 8 bytes.
BARLOW_DEVICE void load_two(const float* from, float (&x)[2]) {
  const Vec8 v = load(reinterpret_cast<const Vec8*>(from));
  x[0] = bits_to_float(v.word[0]);
  x[1] = bits_to_float(v.word[1]);
}

// Stores this warp's rows of a box: rows first_row + 0..15 of the matrix, as far as they exist.
template <class T>
BARLOW_DEVICE void store_box(const char* box, const Matrix& m, bool vectors, int n, int d, int first_row, int column) {
  warp_barrier();  // the other lanes' results
  const int chunk = lane() % 8;
  column += chunk * 8;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = i * 4 + lane() / 8;
    const int64_t row = first_row + r;
    if (row < n && column < d) {
      const char* const from = box + (warp() * 16 + r) * 128 + (chunk ^ (r & 7)) * 16;
      T* const to = static_cast<T*>(m.data) + row * m.row_stride + column * m.column_stride;
      if (vectors && column + 8 <= d) {
        store(reinterpret_cast<Vec16*>(to), load(reinterpret_cast<const Vec16*>(from)));
      } else {
#pragma unroll 1
        for (int e = 0; e < smaller(8, d - column); ++e)
          to[e * m.column_stride] = load(reinterpret_cast<const T*>(from) + e);
      }
    }
  }
}

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

// Whether a gradient's matrices are what the epilogues here read and write.
inline bool hopper_can_finish(const InputGrad& p) {
  for (int view = 0; view < 2; ++view) {
    if (!has_tensor_map(p.own[view]) || p.own[view].dtype != p.hat[view].dtype) return false;
    if (p.grad[view].data != nullptr && p.grad[view].dtype != p.hat[view].dtype) return false;
  }
  return true;
}

}  // namespace barlow
