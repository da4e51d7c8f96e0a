// hopper.h: what kernels for sm_90a ask of a GPU beyond device.h: bulk copies by the tensor memory accelerator (TMA),
// barriers in shared memory that count their bytes, products of whole warpgroups (wgmma), and clusters of blocks.
//
// As in device.h these are single instructions when nvcc compiles them, and plain C++ with BARLOW_EMULATION.
//
// How the pieces fit together: one thread asks the TMA for a box of a matrix. The copy runs by itself and reports its
// bytes to an mbarrier in shared memory; who wants the data waits there. wgmma, too, runs by itself: 128 threads start
// a 64 x N product of tiles in shared memory, described by two 64-bit descriptors, and wait for it later.
#pragma once

#include "gpu/device.h"

namespace barlow {

// A box of a matrix is copied as rows of 128 bytes, that is, 64 numbers of 16 bits, in which the 16-byte chunks of each
// eight rows are permuted (address bits 4 to 6 are XORed with bits 7 to 9): 1024 bytes that wgmma reads without bank
// conflicts along rows and down columns. Boxes start at multiples of 1024 bytes.
constexpr int box_columns = 64;

// What the TMA needs: aligned memory, and whole 16-byte pieces from one row to the next.
inline bool has_tensor_map(const Matrix& m) {
  return m.data != nullptr && m.dtype != DType::float32 && m.column_stride == 1 && m.row_stride > 0 &&
         m.row_stride % 8 == 0 && m.row_stride < (int64_t{1} << 38) && reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
}

// How a tile of a factor lies in shared memory, for wgmma: start, "leading" and "stride" byte offset, 128-byte swizzle
// (PTX ISA, "Matrix descriptor format"). The tile is an array of boxes.
//
// * k-major: rows are m or n, 128 bytes of k. Eight rows are 1024 bytes: the stride offset. The leading one is unused.
//   The next 16 k begin 32 bytes further on.
// * mn-major: rows are k, 128 bytes of m or n. Eight rows are 1024 bytes: the stride offset. The next 64 m or n are in
//   the next box: the leading offset. The next 16 k begin 2048 bytes further on.
template <bool K_MAJOR, int BOX_BYTES>
BARLOW_DEVICE uint64_t wgmma_descriptor(uint32_t address) {
  constexpr uint64_t leading = K_MAJOR ? 16 : BOX_BYTES, stride = 1024, swizzle_128 = 1;
  return (address & 0x3ffff) >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | swizzle_128 << 62;
}
template <bool K_MAJOR>
constexpr uint64_t wgmma_next_k = (K_MAJOR ? 32 : 2048) >> 4;  // added to a descriptor

}  // namespace barlow

#ifdef BARLOW_EMULATION
#include "gpu/emulation/hopper.h"
#else
#include "gpu/hopper_cuda.h"
#endif
