// How the bindings of the CPU and of the CUDA library check the ops' arguments and fill the kernels' argument structs.
// For bindings only: it includes torch, through the LibTorch stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "dtypes.h"

namespace riformer {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The parameters of `block` in the order of its schema: as a parameter list, and as arguments to pass them on.
#define RIFORMER_BLOCK_PARAMETERS                                                                                      \
  const OptionalTensor &layer_scale_1, const OptionalTensor &norm1_weight, const OptionalTensor &norm1_bias,           \
      const OptionalTensor &affine_weight, const OptionalTensor &affine_bias, double eps1, const Tensor &norm2_weight, \
      const Tensor &norm2_bias, double eps2, const Tensor &fc1_weight, const OptionalTensor &fc1_bias,                 \
      const Tensor &fc2_weight, const OptionalTensor &fc2_bias, const OptionalTensor &layer_scale_2,                   \
      bool per_position, bool residual, bool int8
#define RIFORMER_BLOCK_ARGUMENTS                                                                             \
  layer_scale_1, norm1_weight, norm1_bias, affine_weight, affine_bias, eps1, norm2_weight, norm2_bias, eps2, \
      fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale_2, per_position, residual, int8

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << "]";
  return text.str();
}

// PyTorch's name of an element type. A type without an overload does not compile.
template <class T>
ScalarType scalar_type_of_element(T) = delete;
constexpr ScalarType scalar_type_of_element(float) { return ScalarType::Float; }
constexpr ScalarType scalar_type_of_element(bf16) { return ScalarType::BFloat16; }
constexpr ScalarType scalar_type_of_element(f16) { return ScalarType::Half; }

inline ScalarType scalar_type_of(DType dtype) {
  return with_dtype(dtype, [](auto element) { return scalar_type_of_element(element); });
}

// Whether this library's kernels take elements of `dtype`. Each bindings.cpp defines it.
bool serves(DType dtype);

// Whether its blocks have int8 products. Each bindings.cpp defines it.
bool serves_int8();

inline DType dtype_of(ScalarType type, const char* name) {
  int count = 0;
  for (const DType dtype : kDTypes) {
    if (!serves(dtype)) continue;
    if (scalar_type_of(dtype) == type) return dtype;
    ++count;
  }
  std::ostringstream served;
  int listed = 0;
  for (const DType dtype : kDTypes) {
    if (!serves(dtype)) continue;
    served << (listed == 0          ? ""
               : listed + 1 < count ? ", "
                                    : " or ")
           << torch::headeronly::toString(scalar_type_of(dtype));
    ++listed;
  }
  fail("riformer: ", name, " has dtype ", torch::headeronly::toString(type), ", expected ", served.str(),
       "; convert it first");
}

inline void check_tokens(const Tensor& x, const char* op) {
  if (x.dim() != 4) fail("riformer::", op, ": x has shape ", shape_of(x), ", expected [B, C, H, W]");
}

template <class Args>
void describe_tokens(Args& args, const Tensor& x) {
  args.batch = x.size(0);
  args.channels = x.size(1);
  args.positions = x.size(2) * x.size(3);
}

// Whether x is channels_last and not contiguous: a tensor that is both (one channel, or one position) counts as
// contiguous, as it does in PyTorch.
inline bool is_channels_last(const Tensor& x) {
  const int64_t c = x.size(1), h = x.size(2), w = x.size(3);
  if (x.is_contiguous()) return false;
  return (c == 1 || x.stride(1) == 1) && (w == 1 || x.stride(3) == c) && (h == 1 || x.stride(2) == w * c) &&
         (x.size(0) == 1 || x.stride(0) == h * w * c);
}

inline Tensor empty_tokens(const Tensor& x, ScalarType dtype, MemoryFormat format) {
  return torch::stable::empty({x.size(0), x.size(1), x.size(2), x.size(3)}, dtype, std::nullopt, x.device(),
                              std::nullopt, format);
}

inline Tensor new_moments(const Tensor& x, int64_t channels) {
  return torch::stable::empty({x.size(0), 2, channels}, ScalarType::Float, std::nullopt, x.device());
}

inline void check_moments(const OptionalTensor& moments, const Tensor& x) {
  if (!moments.has_value()) fail("riformer: moments are missing; GroupNorm takes its statistics from them");
  if (moments->dim() != 3 || moments->size(0) != x.size(0) || moments->size(1) != 2 || moments->size(2) != x.size(1))
    fail("riformer: moments have shape ", shape_of(*moments), ", expected [", x.size(0), ", 2, ", x.size(1), "]");
  if (moments->scalar_type() != ScalarType::Float)
    fail("riformer: moments have dtype ", torch::headeronly::toString(moments->scalar_type()), ", expected Float");
}

inline void check_vector(const Tensor& tensor, int64_t count, const char* name) {
  if (tensor.numel() != count) fail("riformer: ", name, " has ", tensor.numel(), " elements, expected ", count);
}

// Checks that a matrix is [rows, columns] or, as the weight of a 1x1 convolution, [rows, columns, 1, 1]. Returns
// whether its memory is row-major, which a channels_last weight is too.
inline bool check_matrix(const Tensor& tensor, int64_t rows, int64_t columns, const char* name) {
  bool matches = (tensor.dim() == 2 || tensor.dim() == 4) && tensor.size(0) == rows && tensor.size(1) == columns;
  for (int64_t i = 2; matches && i < tensor.dim(); ++i) matches = tensor.size(i) == 1;
  if (!matches)
    fail("riformer: ", name, " has shape ", shape_of(tensor), ", expected [", rows, ", ", columns,
         "] or that with two ones");
  return tensor.is_contiguous() || (tensor.stride(1) == 1 && tensor.stride(0) == columns);
}

// Fills in the sizes and strides of images.
template <class Args>
void describe_images(Args& args, const Tensor& x) {
  check_tokens(x, "embed");
  args.batch = x.size(0);
  args.in_channels = x.size(1);
  args.height = x.size(2);
  args.width = x.size(3);
  args.stride_batch = x.stride(0);
  args.stride_channel = x.stride(1);
  args.stride_row = x.stride(2);
  args.stride_column = x.stride(3);
}

// Checks and fills in what a convolution of the images that `args` describes has besides them. The caller fills in the
// pointers and what depends on the device.
template <class Args>
void describe_convolution(Args& args, const Tensor& weight, int64_t stride, int64_t padding) {
  if (weight.dim() != 4 || weight.size(1) != args.in_channels)
    fail("riformer::embed: weight has shape ", shape_of(weight), " for images of shape [", args.batch, ", ",
         args.in_channels, ", ", args.height, ", ", args.width, "]; expected [channels, ", args.in_channels,
         ", kernel height, kernel width]");
  if (weight.size(1) * weight.size(2) * weight.size(3) == 0)
    fail("riformer::embed: weight has shape ", shape_of(weight), ": there is nothing to sum");
  if (stride < 1 || padding < 0)
    fail("riformer::embed: stride ", stride, " and padding ", padding, ", expected >= 1 and >= 0");
  args.channels = weight.size(0);
  args.kernel_height = weight.size(2);
  args.kernel_width = weight.size(3);
  args.stride = stride;
  args.padding = padding;
  const int64_t spare_height = args.height + 2 * padding - args.kernel_height;
  const int64_t spare_width = args.width + 2 * padding - args.kernel_width;
  if (spare_height < 0 || spare_width < 0)
    fail("riformer::embed: images of ", args.height, "x", args.width, " are smaller than the ", args.kernel_height, "x",
         args.kernel_width, " kernel with padding ", padding);
  args.out_height = spare_height / stride + 1;
  args.out_width = spare_width / stride + 1;
}

template <class Args>
void describe_embed(Args& args, const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding) {
  describe_images(args, x);
  describe_convolution(args, weight, stride, padding);
}

// Checks and fills in the parameters of a block whose tokens `args` describes. `parameters` keeps them alive.
template <class Args, class Parameters>
void describe_block_parameters(Args& args, Parameters& parameters, RIFORMER_BLOCK_PARAMETERS) {
  args.hidden = fc1_weight.dim() > 0 ? fc1_weight.size(0) : 0;
  const int64_t channels = args.channels;
  if (channels % 8 || args.hidden % 8 || channels == 0 || args.hidden == 0)
    fail("riformer::block: ", channels, " channels and ", args.hidden,
         " hidden channels, expected multiples of 8; use backend='reference' for other widths");
  if (norm1_weight.has_value() != layer_scale_1.has_value() || norm1_weight.has_value() != norm1_bias.has_value())
    fail("riformer::block: layer_scale_1, norm1_weight and norm1_bias go together: give all three or none");
  if (affine_weight.has_value() && !norm1_weight.has_value())
    fail("riformer::block: affine_weight needs norm1_weight, into which it is folded");
  if (affine_bias.has_value() && !affine_weight.has_value()) fail("riformer::block: affine_bias needs affine_weight");
  if (int8 && !serves_int8())
    fail("riformer::block: int8 is true, and these kernels have no int8 products, only the CPU's have; leave it false");
  args.layer_scale_1 = parameters.vector(layer_scale_1, channels, "layer_scale_1");
  args.norm1_weight = parameters.vector(norm1_weight, channels, "norm1_weight");
  args.norm1_bias = parameters.vector(norm1_bias, channels, "norm1_bias");
  args.affine_weight = parameters.vector(affine_weight, channels, "affine_weight");
  args.affine_bias = parameters.vector(affine_bias, channels, "affine_bias");
  args.eps1 = static_cast<decltype(args.eps1)>(eps1);
  args.norm2_weight = parameters.vector(norm2_weight, channels, "norm2_weight");
  args.norm2_bias = parameters.vector(norm2_bias, channels, "norm2_bias");
  args.eps2 = static_cast<decltype(args.eps2)>(eps2);
  args.fc1_weight = parameters.matrix(fc1_weight, args.hidden, channels, "fc1_weight");
  args.fc1_bias = parameters.vector(fc1_bias, args.hidden, "fc1_bias");
  args.fc2_weight = parameters.matrix(fc2_weight, channels, args.hidden, "fc2_weight");
  args.fc2_bias = parameters.vector(fc2_bias, channels, "fc2_bias");
  args.layer_scale_2 = parameters.vector(layer_scale_2, channels, "layer_scale_2");
  args.per_position = per_position;
  args.residual = residual;
}

// Checks and fills in everything of a block but the pointers of its tokens and moments.
template <class Args, class Parameters>
void describe_block(Args& args, Parameters& parameters, const Tensor& x, RIFORMER_BLOCK_PARAMETERS) {
  check_tokens(x, "block");
  args.dtype = dtype_of(x.scalar_type(), "x");
  describe_tokens(args, x);
  if (args.batch > 0 && args.positions == 0)
    fail("riformer::block: x has shape ", shape_of(x), ": moments of no positions do not exist");
  describe_block_parameters(args, parameters, RIFORMER_BLOCK_ARGUMENTS);
}

}  // namespace riformer
