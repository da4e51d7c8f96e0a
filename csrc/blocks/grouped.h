// grouped.h: the order in which blocks take the tiles of a product.
#pragma once

#include "gpu/device.h"

namespace barlow {

// Eight rows of tiles at a time, so that blocks that run together share their operands in L2.
BARLOW_HOST_DEVICE void grouped_tile(int index, int rows, int columns, int& row, int& column) {
  constexpr int group = 8;
  const int first = index / (group * columns) * group;
  const int here = smaller(rows - first, group);
  row = first + index % (group * columns) % here;
  column = index % (group * columns) / here;
}

}  // namespace barlow
