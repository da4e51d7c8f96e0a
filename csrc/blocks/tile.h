// tile.h: a finished tile of a product in shared memory, and rows of it worked off 16 bytes at a time.
//
// The tensor cores leave a tile scattered over a block's registers: good for nothing but adding. It goes through shared
// memory once, as float32, and then a thread takes per_vec neighbouring columns, row after row: whatever belongs to a
// feature stays in its registers, and global memory is read and written in whole 16-byte pieces.
#pragma once

#include "blocks/multiply.h"

namespace barlow {

template <class T, int M, int N, int THREADS>
struct Tile {
  static constexpr int E = per_vec<T>;            // columns of a thread
  static constexpr int groups = N / E;            // threads that share a row
  static constexpr int lanes = THREADS / groups;  // rows at a time
  static constexpr int pitch = N + 8;             // floats: four rows of an 8-byte write fall into different banks
  static constexpr int bytes = M * pitch * 4;
  static_assert(THREADS % groups == 0 && M % lanes == 0, "whole rows");

  static BARLOW_DEVICE int first_row() { return thread() / groups; }
  static BARLOW_DEVICE int first_column() { return thread() % groups * E; }

  static BARLOW_DEVICE void read(const float* tile, int row, float (&x)[E]) {
    const Vec16* from = reinterpret_cast<const Vec16*>(tile + row * pitch + first_column());
#pragma unroll
    for (int v = 0; v < E / 4; ++v) {
      const Vec16 four = load(from + v);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[4 * v + i] = bits_to_float(four.word[i]);
    }
  }
};

// Writes a warp's fragments (Multiply::Accumulator) to a tile of rows `pitch` floats apart.
template <class Product, int PITCH>
BARLOW_DEVICE void write_tile(const typename Product::Accumulator& acc, float* tile) {
#pragma unroll
  for (int i = 0; i < Product::ROWS; ++i) {
#pragma unroll
    for (int j = 0; j < Product::COLUMNS; ++j) {
      float* to = tile + Product::row_of(i) * PITCH + Product::column_of(j);
      to[0] = acc[i][j][0];
      to[1] = acc[i][j][1];
      to[8 * PITCH] = acc[i][j][2];
      to[8 * PITCH + 1] = acc[i][j][3];
    }
  }
}

// E neighbouring numbers of a row as float32; the first `count` exist, the others are 0.
template <class T, int E>
BARLOW_DEVICE void load_row(const Matrix& m, bool vectors, int64_t row, int column, int count, float (&x)[E]) {
  const T* from = static_cast<const T*>(m.data) + row * m.row_stride + column * m.column_stride;
  if (vectors && count == E && E == per_vec<T>) {
    if constexpr (E == per_vec<T>) unpack(load(reinterpret_cast<const Vec16*>(from)), x, T{});
  } else {
#pragma unroll
    for (int e = 0; e < E; ++e) x[e] = e < count ? to_float(load(from + e * m.column_stride)) : 0.f;
  }
}

template <class T, int E>
BARLOW_DEVICE void store_row(const Matrix& m, bool vectors, int64_t row, int column, int count, const float (&x)[E]) {
  T* to = static_cast<T*>(m.data) + row * m.row_stride + column * m.column_stride;
  if (vectors && count == E && E == per_vec<T>) {
    if constexpr (E == per_vec<T>) store(reinterpret_cast<Vec16*>(to), pack(x, T{}));
  } else {
#pragma unroll
    for (int e = 0; e < E; ++e) {
      if (e < count) to[e * m.column_stride] = from_float<T>(x[e]);
    }
  }
}

// Two neighbouring numbers, rounded; 4-byte aligned in half precision.
template <class T>
BARLOW_DEVICE void store_two(T* to, const float (&x)[2]) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<uint32_t*>(to) = pack_two<T>(x[0], x[1]);
  } else {
    to[0] = from_float<T>(x[0]);
    to[1] = from_float<T>(x[1]);
  }
}

// store_row and load_row of whatever the matrix holds. That may differ from T: gradients of small half-precision inputs,
// which are multiplied in float32, and parts of a distributed batch, whose sums go on in float32.
template <class T, int E>
BARLOW_DEVICE void store_row_as(const Matrix& m, bool vectors, int64_t row, int column, int count,
                                const float (&x)[E]) {
  if (m.dtype == TypeOf<T>::dtype) {
    store_row<T>(m, vectors, row, column, count, x);
  } else if (m.dtype == DType::float32) {
    store_row<float>(m, false, row, column, count, x);
  } else if (m.dtype == DType::bfloat16) {
    store_row<bfloat16>(m, false, row, column, count, x);
  } else {
    store_row<float16>(m, false, row, column, count, x);
  }
}

template <class T, int E>
BARLOW_DEVICE void load_row_as(const Matrix& m, bool vectors, int64_t row, int column, int count, float (&x)[E]) {
  if (m.dtype == TypeOf<T>::dtype) {
    load_row<T>(m, vectors, row, column, count, x);
  } else if (m.dtype == DType::float32) {
    load_row<float>(m, false, row, column, count, x);
  } else if (m.dtype == DType::bfloat16) {
    load_row<bfloat16>(m, false, row, column, count, x);
  } else {
    load_row<float16>(m, false, row, column, count, x);
  }
}

// E numbers of a row of `stats`; those past D are 0.
template <int E>
BARLOW_DEVICE void load_stat(const float* stats, int stat, int d, int column, float (&x)[E]) {
#pragma unroll
  for (int e = 0; e < E; ++e) x[e] = column + e < d ? stats[static_cast<int64_t>(stat) * d + column + e] : 0.f;
}

}  // namespace barlow
