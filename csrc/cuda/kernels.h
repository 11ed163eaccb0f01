// What the bindings call: one launcher per op, with everything it needs in one struct. No torch, no CUDA headers.
//
// Tokens are [B, N, C] with C contiguous and 16-byte aligned rows (C a multiple of 8); weights of matrices are in the
// tokens' dtype, 16-byte aligned and contiguous; parameter vectors are of any dtype. Moments are float32 [B, 2, C]: per
// image and channel the mean and the centred sum of squares. Launchers throw std::runtime_error; the text has the
// configuration. Workspaces come from the caller, who asks for their size in bytes first; they are 256-byte aligned.
#pragma once

#include <cstdint>
#include <string>

#include "../common/dtypes.h"

namespace riformer::cuda {

// A parameter vector: a pointer and its dtype, which may differ from the tokens'; null where it is left out.
struct Parameter {
  const void* data;
  DType dtype;
};

// What the kernels run on: compute capability as 80, 86, 90, ...; multiprocessors; the current cudaStream_t.
struct Device {
  int architecture;
  int processors;
  void* stream;
};

struct MomentsArgs {
  Device device;
  const void* x;
  DType dtype;
  int64_t batch, positions, channels;
  float* moments;
  void* workspace;
};
int64_t moments_workspace(const MomentsArgs& args);
void moments(const MomentsArgs& args);

// Convolution as an implicit matrix product: rows are output positions, the sum runs over kernel_height x kernel_width
// x in_channels. x is read where it lies (any strides, its own dtype) and rounded to `dtype` on the way.
struct EmbedArgs {
  Device device;
  const void* x;
  DType x_dtype;
  int64_t batch, in_channels, height, width;
  int64_t stride_batch, stride_channel, stride_row, stride_column;  // of x, in elements
  const void* weight;                                               // [C, KH, KW, Cin] in `dtype`
  Parameter bias;
  DType dtype;  // of the result and of the products
  int64_t channels, kernel_height, kernel_width, stride, padding, out_height, out_width;
  void* out;       // [B, OH * OW, C]
  float* moments;  // [B, 2, C], or null
  void* workspace;
};
int64_t embed_workspace(const EmbedArgs& args);
void embed(const EmbedArgs& args);

struct BlockArgs {
  Device device;
  const void* x;
  void* out;  // may be x
  DType dtype;
  int64_t batch, positions, channels, hidden;
  const float* moments;  // of x; null with per_position
  float* moments_out;    // of out; may be `moments`; null with per_position
  Parameter layer_scale_1, norm1_weight, norm1_bias, affine_weight, affine_bias;
  float eps1;
  Parameter norm2_weight, norm2_bias;
  float eps2;
  const void* fc1_weight;  // [hidden, C]
  Parameter fc1_bias;
  const void* fc2_weight;  // [C, hidden]
  Parameter fc2_bias, layer_scale_2;
  bool per_position, residual;
  void* workspace;
};
int64_t block_workspace(const BlockArgs& args);
void block(const BlockArgs& args);
// Which kernels with which tiles `block` would run, as text; a pure function of channels, hidden, positions, dtype and
// architecture, never of the batch.
std::string block_choice(const BlockArgs& args);

// GroupNorm(1) from moments, or LayerNorm per position, into `out_dtype`.
struct NormArgs {
  Device device;
  const void* x;
  DType dtype;
  int64_t batch, positions, channels;
  const float* moments;  // null with per_position
  Parameter weight, bias;
  float eps;
  bool per_position;
  void* out;  // [B, N, C]
  DType out_dtype;
};
void norm(const NormArgs& args);

// Class scores: final norm, average over positions, linear.
struct HeadArgs {
  Device device;
  const void* x;  // read only with per_position
  DType dtype;
  int64_t batch, positions, channels, classes;
  const float* moments;  // null with per_position
  Parameter norm_weight, norm_bias;
  float eps;
  Parameter fc_weight, fc_bias;  // [classes, C], [classes]
  bool per_position;
  void* out;  // [B, classes]
  DType out_dtype;
  void* workspace;
};
int64_t head_workspace(const HeadArgs& args);
void head(const HeadArgs& args);

// `count` values from one dtype to another (round to nearest even): weights whose dtype is not the tokens'.
void convert(const Device& device, const void* from, DType from_dtype, void* to, DType to_dtype, int64_t count);

}  // namespace riformer::cuda
