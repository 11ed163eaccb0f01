// The only file that knows torch: checks the arguments of the ops, lays out tensors, and calls the chosen kernels.
// Built on the LibTorch stable ABI, so that one library serves every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "dispatch.h"

namespace {

using riformer::DType;
using riformer::cpu::Kernels;
using riformer::cpu::Parameter;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << "]";
  return text.str();
}

DType dtype_of(ScalarType dtype, const char* name) {
  switch (dtype) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default:
      fail("riformer: ", name, " has dtype ", torch::headeronly::toString(dtype),
           ", expected Float, BFloat16 or Half; convert it first");
  }
}

const Kernels& kernels() {
  const Kernels* chosen = riformer::cpu::kernels();
  if (!chosen) fail("riformer: no CPU kernels are selected: ", riformer::cpu::describe());
  return *chosen;
}

riformer::cpu::Pool pool() {
  const auto run = [](int64_t count, void (*task)(int64_t, int64_t, void*), void* context) {
    torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) { task(begin, end, context); });
  };
  return {run, static_cast<int64_t>(torch::stable::get_num_threads())};
}

void report_memory(int64_t missing) {
  if (missing) fail("riformer: out of memory: ", missing, " bytes of working memory could not be had");
}

// Contiguous parameters stay alive here while the kernels read them.
struct Parameters {
  std::vector<Tensor> held;

  Parameter vector(const OptionalTensor& tensor, int64_t count, const char* name) {
    if (!tensor.has_value()) return {};
    if (tensor->numel() != count)
      fail("riformer: ", name, " has ", tensor->numel(), " elements, expected ", count);
    return hold(*tensor, name);
  }
  // [rows, columns] or [rows, columns, 1, 1], both row-major.
  Parameter matrix(const Tensor& tensor, int64_t rows, int64_t columns, const char* name) {
    bool matches = (tensor.dim() == 2 || tensor.dim() == 4) && tensor.size(0) == rows && tensor.size(1) == columns;
    for (int64_t i = 2; matches && i < tensor.dim(); ++i) matches = tensor.size(i) == 1;
    if (!matches) fail("riformer: ", name, " has shape ", shape_of(tensor), ", expected [", rows, ", ", columns, "] or that with two ones");
    if (tensor.stride(1) == 1 && tensor.stride(0) == columns) return keep(tensor, name);  // channels_last counts too
    return hold(tensor, name);
  }
  Parameter hold(const Tensor& tensor, const char* name) {
    return keep(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor), name);
  }
  Parameter keep(const Tensor& tensor, const char* name) {
    if (!tensor.is_cpu()) fail("riformer: ", name, " is not on the CPU, the tokens are");
    held.push_back(tensor);
    return {tensor.const_data_ptr(), dtype_of(tensor.scalar_type(), name)};
  }
};

void check_tokens(const Tensor& x, const char* op) {
  if (x.dim() != 4) fail("riformer::", op, ": x has shape ", shape_of(x), ", expected [B, C, H, W]");
}

// A layout as PyTorch sees it: a tensor that is contiguous in both senses counts as contiguous.
bool is_channels_last(const Tensor& x) {
  const int64_t c = x.size(1), h = x.size(2), w = x.size(3);
  if (x.is_contiguous()) return false;
  return (c == 1 || x.stride(1) == 1) && (w == 1 || x.stride(3) == c) && (h == 1 || x.stride(2) == w * c) &&
         (x.size(0) == 1 || x.stride(0) == h * w * c);
}

Tensor like(const Tensor& x, ScalarType dtype) {
  return torch::stable::empty({x.size(0), x.size(1), x.size(2), x.size(3)}, dtype, std::nullopt, x.device(), std::nullopt,
                              MemoryFormat::Contiguous);
}

Tensor in_layout_of(const Tensor& x, const Tensor& result) {
  return is_channels_last(x) ? torch::stable::contiguous(result, MemoryFormat::ChannelsLast) : result;
}

Tensor new_moments(const Tensor& x, int64_t channels) {
  return torch::stable::empty({x.size(0), 2, channels}, ScalarType::Float, std::nullopt, x.device());
}

// Float32 [B, 2, C], contiguous; null with per_position.
const float* moments_data(const OptionalTensor& moments, const Tensor& x, bool per_position, Tensor& held) {
  if (per_position) return nullptr;
  if (!moments.has_value()) fail("riformer: moments are missing; GroupNorm takes its statistics from them");
  if (moments->dim() != 3 || moments->size(0) != x.size(0) || moments->size(1) != 2 || moments->size(2) != x.size(1))
    fail("riformer: moments have shape ", shape_of(*moments), ", expected [", x.size(0), ", 2, ", x.size(1), "]");
  if (moments->scalar_type() != ScalarType::Float)
    fail("riformer: moments have dtype ", torch::headeronly::toString(moments->scalar_type()), ", expected Float");
  held = moments->is_contiguous() ? *moments : torch::stable::contiguous(*moments);
  return static_cast<const float*>(held.const_data_ptr());
}

Tensor moments(const Tensor& x) {
  check_tokens(x, "moments");
  Tensor out = new_moments(x, x.size(1));
  const Tensor tokens = torch::stable::contiguous(x);
  riformer::cpu::MomentsArgs args{};
  args.x = tokens.const_data_ptr();
  args.dtype = dtype_of(x.scalar_type(), "x");
  args.batch = x.size(0);
  args.channels = x.size(1);
  args.positions = x.size(2) * x.size(3);
  args.moments_out = static_cast<float*>(out.mutable_data_ptr());
  args.pool = pool();
  if (args.batch * args.channels > 0) {
    if (args.positions == 0) fail("riformer::moments: x has shape ", shape_of(x), ": moments of no positions do not exist");
    report_memory(kernels().moments(args));
  }
  return out;
}

std::tuple<Tensor, Tensor> embed(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t stride,
                                 int64_t padding, ScalarType dtype, bool moments) {
  check_tokens(x, "embed");
  if (weight.dim() != 4 || weight.size(1) != x.size(1))
    fail("riformer::embed: weight has shape ", shape_of(weight), " for images of shape ", shape_of(x),
         "; expected [channels, ", x.size(1), ", kernel height, kernel width]");
  if (weight.size(1) * weight.size(2) * weight.size(3) == 0)
    fail("riformer::embed: weight has shape ", shape_of(weight), ": there is nothing to sum");
  if (stride < 1 || padding < 0) fail("riformer::embed: stride ", stride, " and padding ", padding, ", expected >= 1 and >= 0");
  riformer::cpu::EmbedArgs args{};
  args.batch = x.size(0);
  args.in_channels = x.size(1);
  args.height = x.size(2);
  args.width = x.size(3);
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
  args.dtype = dtype_of(dtype, "the result");
  args.x_dtype = dtype_of(x.scalar_type(), "x");
  Tensor out = torch::stable::empty({args.batch, args.channels, args.out_height, args.out_width}, dtype, std::nullopt,
                                    x.device(), std::nullopt, MemoryFormat::Contiguous);
  Tensor out_moments = new_moments(x, moments ? args.channels : 0);
  if (args.batch == 0 || args.channels == 0) return {out, out_moments};
  Parameters parameters;
  // The kernel takes input channels two at a time; with an odd number the taps' order must be the contiguous one.
  args.weight_channels_last = is_channels_last(weight) && args.in_channels % 2 == 0;
  args.weight = args.weight_channels_last ? parameters.keep(weight, "weight") : parameters.hold(weight, "weight");
  args.bias = parameters.vector(bias, args.channels, "bias");
  args.x = x.const_data_ptr();
  args.stride_batch = x.stride(0);
  args.stride_channel = x.stride(1);
  args.stride_row = x.stride(2);
  args.stride_column = x.stride(3);
  args.out = out.mutable_data_ptr();
  args.moments_out = moments ? static_cast<float*>(out_moments.mutable_data_ptr()) : nullptr;
  args.pool = pool();
  report_memory(kernels().embed(args));
  return {out, out_moments};
}

// Everything of a block but its tokens: checked against `x`.
riformer::cpu::BlockArgs block_args(Parameters& parameters, const Tensor& x, const OptionalTensor& layer_scale_1,
                                    const OptionalTensor& norm1_weight, const OptionalTensor& norm1_bias,
                                    const OptionalTensor& affine_weight, const OptionalTensor& affine_bias, double eps1,
                                    const Tensor& norm2_weight, const Tensor& norm2_bias, double eps2,
                                    const Tensor& fc1_weight, const OptionalTensor& fc1_bias, const Tensor& fc2_weight,
                                    const OptionalTensor& fc2_bias, const OptionalTensor& layer_scale_2,
                                    bool per_position, bool residual) {
  check_tokens(x, "block");
  riformer::cpu::BlockArgs args{};
  args.dtype = dtype_of(x.scalar_type(), "x");
  args.batch = x.size(0);
  args.channels = x.size(1);
  args.positions = x.size(2) * x.size(3);
  args.hidden = fc1_weight.dim() > 0 ? fc1_weight.size(0) : 0;
  const int64_t channels = args.channels;
  if (args.batch > 0 && args.positions == 0)
    fail("riformer::block: x has shape ", shape_of(x), ": moments of no positions do not exist");
  if (channels % 8 || args.hidden % 8 || channels == 0 || args.hidden == 0)
    fail("riformer::block: ", channels, " channels and ", args.hidden,
         " hidden channels, expected multiples of 8; use backend='reference' for other widths");
  if (norm1_weight.has_value() != layer_scale_1.has_value() || norm1_weight.has_value() != norm1_bias.has_value())
    fail("riformer::block: layer_scale_1, norm1_weight and norm1_bias go together: give all three or none");
  if (affine_weight.has_value() && !norm1_weight.has_value())
    fail("riformer::block: affine_weight needs norm1_weight, into which it is folded");
  if (affine_bias.has_value() && !affine_weight.has_value())
    fail("riformer::block: affine_bias needs affine_weight");
  args.layer_scale_1 = parameters.vector(layer_scale_1, channels, "layer_scale_1");
  args.norm1_weight = parameters.vector(norm1_weight, channels, "norm1_weight");
  args.norm1_bias = parameters.vector(norm1_bias, channels, "norm1_bias");
  args.affine_weight = parameters.vector(affine_weight, channels, "affine_weight");
  args.affine_bias = parameters.vector(affine_bias, channels, "affine_bias");
  args.eps1 = eps1;
  args.norm2_weight = parameters.vector(norm2_weight, channels, "norm2_weight");
  args.norm2_bias = parameters.vector(norm2_bias, channels, "norm2_bias");
  args.eps2 = eps2;
  args.fc1_weight = parameters.matrix(fc1_weight, args.hidden, channels, "fc1_weight");
  args.fc1_bias = parameters.vector(fc1_bias, args.hidden, "fc1_bias");
  args.fc2_weight = parameters.matrix(fc2_weight, channels, args.hidden, "fc2_weight");
  args.fc2_bias = parameters.vector(fc2_bias, channels, "fc2_bias");
  args.layer_scale_2 = parameters.vector(layer_scale_2, channels, "layer_scale_2");
  args.per_position = per_position;
  args.residual = residual;
  args.pool = pool();
  return args;
}

std::tuple<Tensor, Tensor> block(const Tensor& x, const OptionalTensor& moments, const OptionalTensor& layer_scale_1,
                                 const OptionalTensor& norm1_weight, const OptionalTensor& norm1_bias,
                                 const OptionalTensor& affine_weight, const OptionalTensor& affine_bias, double eps1,
                                 const Tensor& norm2_weight, const Tensor& norm2_bias, double eps2,
                                 const Tensor& fc1_weight, const OptionalTensor& fc1_bias, const Tensor& fc2_weight,
                                 const OptionalTensor& fc2_bias, const OptionalTensor& layer_scale_2, bool per_position,
                                 bool residual) {
  Parameters parameters;
  riformer::cpu::BlockArgs args =
      block_args(parameters, x, layer_scale_1, norm1_weight, norm1_bias, affine_weight, affine_bias, eps1, norm2_weight,
                 norm2_bias, eps2, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale_2, per_position, residual);
  Tensor held;
  args.moments = moments_data(moments, x, per_position, held);
  Tensor out = like(x, x.scalar_type());
  Tensor out_moments = new_moments(x, per_position ? 0 : args.channels);
  if (args.batch * args.positions > 0) {
    const Tensor tokens = torch::stable::contiguous(x);
    args.x = tokens.const_data_ptr();
    args.out = out.mutable_data_ptr();
    args.moments_out = per_position ? nullptr : static_cast<float*>(out_moments.mutable_data_ptr());
    report_memory(kernels().block(args));
  }
  return {in_layout_of(x, out), out_moments};
}

void block_in_place(Tensor x, OptionalTensor moments, const OptionalTensor& layer_scale_1,
                    const OptionalTensor& norm1_weight, const OptionalTensor& norm1_bias,
                    const OptionalTensor& affine_weight, const OptionalTensor& affine_bias, double eps1,
                    const Tensor& norm2_weight, const Tensor& norm2_bias, double eps2, const Tensor& fc1_weight,
                    const OptionalTensor& fc1_bias, const Tensor& fc2_weight, const OptionalTensor& fc2_bias,
                    const OptionalTensor& layer_scale_2, bool per_position, bool residual) {
  Parameters parameters;
  riformer::cpu::BlockArgs args =
      block_args(parameters, x, layer_scale_1, norm1_weight, norm1_bias, affine_weight, affine_bias, eps1, norm2_weight,
                 norm2_bias, eps2, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale_2, per_position, residual);
  Tensor held;
  args.moments = moments_data(moments, x, per_position, held);
  if (args.batch * args.positions == 0) return;
  const bool direct = x.is_contiguous();
  Tensor tokens = direct ? x : torch::stable::contiguous(x);
  args.x = tokens.const_data_ptr();
  args.out = tokens.mutable_data_ptr();
  args.moments_out = per_position ? nullptr : static_cast<float*>(held.mutable_data_ptr());
  report_memory(kernels().block(args));
  if (!direct) torch::stable::copy_(x, tokens);
  if (!per_position && !moments->is_contiguous()) torch::stable::copy_(*moments, held);
}

Tensor norm(const Tensor& x, const OptionalTensor& moments, const Tensor& weight, const Tensor& bias, double eps,
            bool per_position, ScalarType dtype) {
  check_tokens(x, "norm");
  Parameters parameters;
  Tensor held;
  riformer::cpu::NormArgs args{};
  args.x_dtype = dtype_of(x.scalar_type(), "x");
  args.dtype = dtype_of(dtype, "the result");
  args.batch = x.size(0);
  args.channels = x.size(1);
  args.positions = x.size(2) * x.size(3);
  args.moments = moments_data(moments, x, per_position, held);
  args.weight = parameters.vector(weight, args.channels, "weight");
  args.bias = parameters.vector(bias, args.channels, "bias");
  args.eps = eps;
  args.per_position = per_position;
  args.pool = pool();
  Tensor out = like(x, dtype);
  if (args.batch * args.positions * args.channels > 0) {
    const Tensor tokens = torch::stable::contiguous(x);
    args.x = tokens.const_data_ptr();
    args.out = out.mutable_data_ptr();
    report_memory(kernels().norm(args));
  }
  return in_layout_of(x, out);
}

Tensor head(const Tensor& x, const OptionalTensor& moments, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
            const Tensor& fc_weight, const OptionalTensor& fc_bias, bool per_position, ScalarType dtype) {
  check_tokens(x, "head");
  Parameters parameters;
  Tensor held;
  riformer::cpu::HeadArgs args{};
  args.x_dtype = dtype_of(x.scalar_type(), "x");
  args.dtype = dtype_of(dtype, "the result");
  args.batch = x.size(0);
  args.channels = x.size(1);
  args.positions = x.size(2) * x.size(3);
  args.classes = fc_weight.dim() > 0 ? fc_weight.size(0) : 0;
  args.moments = moments_data(moments, x, per_position, held);
  args.norm_weight = parameters.vector(norm_weight, args.channels, "norm_weight");
  args.norm_bias = parameters.vector(norm_bias, args.channels, "norm_bias");
  args.eps = eps;
  args.fc_weight = parameters.matrix(fc_weight, args.classes, args.channels, "fc_weight");
  args.fc_bias = parameters.vector(fc_bias, args.classes, "fc_bias");
  args.per_position = per_position;
  args.pool = pool();
  Tensor out = torch::stable::empty({args.batch, args.classes}, dtype, std::nullopt, x.device());
  if (args.batch * args.classes == 0) return out;
  if (args.positions * args.channels == 0) fail("riformer::head: x has shape ", shape_of(x), ": there is nothing to pool");
  Tensor tokens = per_position ? torch::stable::contiguous(x) : x;
  args.x = tokens.const_data_ptr();
  args.out = out.mutable_data_ptr();
  report_memory(kernels().head(args));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(riformer, CPU, library) {
  library.impl("moments", TORCH_BOX(&moments));
  library.impl("embed", TORCH_BOX(&embed));
  library.impl("block", TORCH_BOX(&block));
  library.impl("block_", TORCH_BOX(&block_in_place));
  library.impl("norm", TORCH_BOX(&norm));
  library.impl("head", TORCH_BOX(&head));
}

// For Python, through ctypes. The text stays valid until the calling thread's next call.
extern "C" __attribute__((visibility("default"))) const char* riformer_cpu_describe() {
  static thread_local std::string text;
  text = riformer::cpu::describe();
  return text.c_str();
}
extern "C" __attribute__((visibility("default"))) const char* riformer_cpu_select(const char* name) {
  static thread_local std::string text;
  text = riformer::cpu::select(name);
  return text.c_str();
}
