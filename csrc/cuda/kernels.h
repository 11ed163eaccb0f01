// What the bindings call: a launcher for each op, with everything that it needs in one struct. No torch and no CUDA
// headers.
//
// Tokens are [B, N, C]: C is contiguous and a multiple of 8, and rows are 16-byte aligned. The weights of matrices are
// in the tokens' dtype, contiguous and 16-byte aligned. Parameter vectors may have any dtype. Moments are float32 [B,
// 2, C]: for each image and channel the mean over the positions and the centred sum of squares.
//
// A launcher throws an exception whose text has the configuration. The caller provides the workspace: it asks for the
// size in bytes first, and aligns the workspace to 256 bytes.
#pragma once

#include <cstdint>
#include <string>

#include "../common/dtypes.h"

namespace riformer::cuda {

// Whether the CUDA kernels have a form for a dtype. Of one for which this says false nothing is compiled, and the
// launchers and the bindings refuse it by name. The switch has no default, so that a new dtype has to be decided on.
constexpr bool kernels_serve(DType dtype) {
  switch (dtype) {
    case DType::f32:
    case DType::bf16:
    case DType::f16: return true;
  }
  return false;
}

constexpr int served_dtype_count() {
  int count = 0;
  for (const DType dtype : kDTypes) count += kernels_serve(dtype);
  return count;
}
constexpr int kServedDTypeCount = served_dtype_count();

// A parameter vector and its dtype, which may differ from that of the tokens. `data` is null where it is left out.
struct Parameter {
  const void* data;
  DType dtype;
};

// What the kernels run on.
struct Device {
  int architecture;  // compute capability: 80, 86, 90, ...
  int processors;    // multiprocessors
  void* stream;      // the current cudaStream_t
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

// A convolution with its bias, and the moments of its result. x is read where it lies, with any strides and its own
// dtype; its values are rounded to `dtype` before they are multiplied.
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
// Which kernels with which tiles `block` would run, as text. A pure function of everything in `args` but the pointers;
// the number of rows and of multiprocessors count too (block_choice.h).
std::string block_choice(const BlockArgs& args);

// The norm of tokens, in `out_dtype`: GroupNorm with one group from the moments, or LayerNorm of each position.
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

// Class scores: the final norm, the average over the positions, the linear layer.
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

// Converts `count` values from one dtype to another, rounding to nearest even. For weights whose dtype is not that of
// the tokens.
void convert(const Device& device, const void* from, DType from_dtype, void* to, DType to_dtype, int64_t count);

}  // namespace riformer::cuda
