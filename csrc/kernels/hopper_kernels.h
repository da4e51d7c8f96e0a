// hopper_kernels.h: the operations on Hopper, in half precision. The same parameters and results as kernels.h's, which
// choose between these and the portable kernels.
#pragma once

#include "gpu/device.h"

namespace barlow {

// Whether a Hopper kernel can run, and should: a Hopper GPU on which its clusters fit, half precision, matrices that the
// TMA can copy (16-byte aligned rows), and enough tiles to fill the chip.
// Blocks of a cluster that hold n rows of `groups` times 16 bytes; 0: not one size of cluster does.
int hopper_normalize_parts(int n, int groups, int device);
bool hopper_can_gram(const Gram&, int device);
int hopper_partial_gram_clusters(int n, int device);  // at once; 0 where none fits, or few rows leave it idle
bool hopper_can_partial_gram(const PartialGram&, int device);
bool hopper_can_correlate(const Correlate&, int device);
bool hopper_can_gram_grad(const InputGrad&, int device);
bool hopper_can_direct_grad(const InputGrad&, int device);

int hopper_gram_clusters(int n, int d, int device);  // of gram's kernel, at once; 0 where none fits
// Beyond hopper_gram_many_rows: parts that are counted, workspace, and steps of a cluster.
GramPlan hopper_plan_squares(int n, int d, int clusters);

struct NormalizeParams;  // normalize.h
struct SlabLayout;
void hopper_normalize(const NormalizeParams&, const SlabLayout&, Stream);
void hopper_gram(const Gram&, Stream);
void hopper_partial_gram(const PartialGram&, Stream);
void hopper_correlate(const Correlate&, Stream);
void hopper_gram_grad(const InputGrad&, Stream);
void hopper_direct_grad(const InputGrad&, Stream);

inline bool is_hopper(int device) { return device_info(device).capability == 90; }

// Whether that many clusters occupy half of the device. Fewer leave more of it idle than the portable kernels, whose
// tiles are smaller, lose by being slower.
inline bool hopper_fills(int device, int cluster, int64_t clusters) {
  return 2 * cluster * clusters >= device_info(device).multiprocessors;
}

// Beyond this many rows gram computes squares of 256 by clusters of 2 blocks; up to them, tiles by clusters of as many
// blocks as a tile has pieces. Of so few that they are half a tile, the tile is half as wide.
constexpr int hopper_gram_many_rows = 256, hopper_gram_narrow_rows = 64;
constexpr int hopper_gram_pieces = 8;

}  // namespace barlow
