// What Python can launch: the four operations, one params struct each. Nothing here knows PyTorch.
//
// Python checks arguments and allocates; the functions below choose a kernel, check what Python cannot see (alignment,
// offsets, shared memory), launch on the given stream and return. They throw std::runtime_error with a sentence.
//
// The same declarations serve two builds: nvcc's, and the host emulation's (emulation/), where pointers are the CPU's.
#pragma once

#include <cstdint>
#include <vector>

namespace barlow {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// What float32 products are worth: true float32 (three TF32 products) or one TF32 product. Halves ignore it.
enum class Precision : int { float32 = 0, tf32 = 1 };

// A matrix in memory; strides count elements.
struct Matrix {
  void* data = nullptr;
  int64_t row_stride = 0;
  int64_t column_stride = 0;
  DType dtype = DType::float32;
};

// The device to run on, and its stream.
struct Stream {
  int device = 0;
  void* handle = nullptr;  // cudaStream_t
};

// The rows of `stats`, [stats_rows, D] float32; view a stands before view b. Without normalization only the first row.
constexpr int stat_c = 0;        // diag(C)
constexpr int stat_mean = 1;     // of z
constexpr int stat_rstd = 3;     // normalization.py's s
constexpr int stat_kappa = 5;    // normalization.py's kappa
constexpr int stat_square = 7;   // mean_n(A_hat^2) = variance * rstd^2
constexpr int stat_product = 9;  // direct route: mean_n(A_hat * P), from the row sums of C0^2 (view b: column sums)
constexpr int stats_rows = 11;

// A_hat and B_hat, every feature's statistics, c = diag(C), and its sums.
struct Normalize {
  Matrix z_a, z_b;      // [N, D], any strides
  Matrix a_hat, b_hat;  // [N, D] out; data = nullptr where nothing is standardised
  float* stats;         // [stats_rows, D] out; [1, D], only c, where nothing is standardised
  double* sums;         // [2, slabs] out: each slab's sums of (c_i - 1)^2 and of c_i^2
  int* counters;        // [counter_count] out: zeros, for the kernel that comes next
  float* partials;      // [chunks, 5, D] workspace; nullptr where chunks = 1
  int counter_count;
  int slabs, chunks;  // of plan_normalize
  int n, d;
  float eps;
  float correction;
  bool normalized;   // false: only c and its sums
  bool eps_in_root;  // 1 / sqrt(var + eps), else 1 / (std + eps)
};

// K_a = A_hat A_hat^T / D - shift (I - 1 1^T / N) and K_b alike, their inner product, and the terms of the loss.
struct Gram {
  Matrix a_hat, b_hat;               // [N, D]
  Matrix k;                          // [2 N, N] out: K_a above K_b; data = nullptr without gradient
  float* partials;                   // [split, 2, tiles, block, block] workspace
  double* inner;                     // [tiles] workspace
  const double* sums;                // [2, slabs] of normalize
  int* counters;                     // [tiles + 1], zero before and after
  float *loss, *on_diag, *off_diag;  // [] out
  int n, d, slabs;
  int block, split, steps;  // of plan_gram
  float lambd, scale;
  float shift;  // 1 where A_hat and B_hat are standardised, else 0
  Precision precision;
};

// One view's K = X_hat X_hat^T, summed over the features that one process of a distributed batch has.
struct PartialGram {
  Matrix x;         // [N, D]
  float* partials;  // [split, size] out: each slice's sums, in panels of `panel` rows of K's lower triangle, one after
                    // the other: rows [i panel, (i + 1) panel) and columns [0, (i + 1) panel), cut at N
  int64_t size;     // of all panels
  int n, d, panel;
  int block, split, steps;  // of plan_partial_gram
  Precision precision;
};

// C = A_hat^T B_hat / N, its sums, and the terms of the loss. Fills stats' last rows.
struct Correlate {
  Matrix z_a, z_b;      // [N, D] raw inputs, multiplied where |mean| / deviation is small; or data = nullptr
  Matrix a_hat, b_hat;  // [N, D]
  Matrix c;             // [D, D] out: C with its diagonal 0, in their dtype or float32; data = nullptr without gradient
  float* stats;         // [stats_rows, D]
  float* row_sums;      // [2, tiles, D] workspace; nullptr without gradient or normalization
  int* counters;        // [2 tiles + 1], zero before and after
  double* off_sums;     // [tiles * tiles] workspace
  const double* sums;   // [2, slabs] of normalize
  float *loss, *on_diag, *off_diag;  // [] out
  int n, d, slabs;
  int block;  // of plan_correlate
  float lambd, scale;
  float raw_limit;  // |mu_i mu_j| s_i s_j up to which z itself is multiplied
  Precision precision;
};

// What the gradients of both routes have in common.
struct InputGrad {
  Matrix own[2];   // [N, D] z_a, z_b where raw, else A_hat, B_hat: what the epilogue reads
  Matrix hat[2];   // [N, D] A_hat, B_hat: what is multiplied
  Matrix product;  // Gram: K, [2 N, N]; direct: C0, [D, D]
  Matrix grad[2];  // [N, D] out; data = nullptr for a gradient that is not wanted
  const float* stats;
  const float *g_loss, *g_on, *g_off;  // [] gradients of the terms; nullptr is zero
  int n, d;
  int k_divisor;  // Gram: what K was divided by: D, or of a part of a distributed batch the D of all parts
  float lambd, scale;
  bool normalized;
  bool raw;  // own is z, standardised again in the epilogue
  Precision precision;
};

struct NormalizePlan {
  int slabs;   // blocks of columns
  int chunks;  // of rows; 1: a slab fits on chip and is read once
};
struct GramPlan {
  int block;         // rows and columns of a tile
  int tiles;         // of the lower triangle, or pieces of them that are counted on their own
  int split;         // slices of D
  int steps;         // tiles along D in a slice
  int64_t partials;  // floats of workspace
  int longest;       // steps that the busiest multiprocessor takes
};
// How a Hopper GPU makes the Gram route's gradients, in half precision; cluster = 0: by the portable kernel.
struct GramGradPlan {
  int cluster;  // blocks that share a slab of 256 features
  int parts;    // row tiles of a block
  int rounds;   // slabs of a cluster
};
struct CorrelatePlan {
  int block;
  int tiles;  // along D
};

NormalizePlan plan_normalize(int n, int d, DType dtype, int device);
GramPlan plan_gram(int n, int d, DType dtype, Precision precision, int device);
GramPlan plan_partial_gram(int n, int d, DType dtype, int device);  // without partials: the caller knows `size`
GramGradPlan plan_gram_grad(int n, int d, int device);              // of both views
CorrelatePlan plan_correlate(int n, int d, DType dtype, Precision precision, int device);

// A kernel that this module can launch.
struct ListedKernel {
  const char *name, *type;      // the C++ type, mangled
  int threads, shared_bytes;    // of a block; 0 bytes where they depend on the shape
  bool hopper;                  // compiled for sm_90a alone
  void (*prepare)(int device);  // what would else happen at the first launch
};
std::vector<ListedKernel> list_kernels();  // all of them

// Loads every kernel onto a device and asks what else the first launches would ask, so that those to come can be
// captured in a graph. Returns how many kernels there are for this device.
int warm_up(int device);

void normalize(const Normalize&, Stream);
void gram(const Gram&, Stream);
void partial_gram(const PartialGram&, Stream);
void correlate(const Correlate&, Stream);
void gram_grad(const InputGrad&, Stream);
void direct_grad(const InputGrad&, Stream);

}  // namespace barlow
