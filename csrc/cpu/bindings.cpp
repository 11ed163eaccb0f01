// The ops as torch calls them: checks their arguments, lays out tensors, and calls the chosen kernels. Built on the
// LibTorch stable ABI, so that one library serves every torch from 2.10 on.
#include <string>
#include <tuple>

#include "../common/ops.h"
#include "host.h"

bool riformer::serves(DType) { return true; }
bool riformer::serves_int8() { return true; }

namespace {

using namespace riformer;
using riformer::cpu::chosen_kernels;
using riformer::cpu::Parameters;
using riformer::cpu::pool;
using riformer::cpu::report;

Tensor like(const Tensor& x, ScalarType dtype) { return empty_tokens(x, dtype, MemoryFormat::Contiguous); }

Tensor in_layout_of(const Tensor& x, const Tensor& result) {
  return is_channels_last(x) ? torch::stable::contiguous(result, MemoryFormat::ChannelsLast) : result;
}

// The moments as the kernels read them, float32 [B, 2, C] contiguous; null with per_position. `held` keeps them alive.
const float* moments_data(const OptionalTensor& moments, const Tensor& x, bool per_position, Tensor& held) {
  if (per_position) return nullptr;
  check_moments(moments, x);
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
  describe_tokens(args, x);
  args.moments_out = static_cast<float*>(out.mutable_data_ptr());
  args.pool = pool();
  if (args.batch * args.channels > 0) {
    if (args.positions == 0)
      fail("riformer::moments: x has shape ", shape_of(x), ": moments of no positions do not exist");
    report(chosen_kernels().moments(args));
  }
  return out;
}

std::tuple<Tensor, Tensor> embed(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t stride,
                                 int64_t padding, ScalarType dtype, bool moments) {
  Parameters parameters;
  riformer::cpu::EmbedArgs args{};
  describe_images(args, x);
  describe_weights(args, parameters, weight, bias, stride, padding);
  args.dtype = dtype_of(dtype, "the result");
  args.x_dtype = dtype_of(x.scalar_type(), "x");
  Tensor out = torch::stable::empty({args.batch, args.channels, args.out_height, args.out_width}, dtype, std::nullopt,
                                    x.device(), std::nullopt, MemoryFormat::Contiguous);
  Tensor out_moments = new_moments(x, moments ? args.channels : 0);
  if (args.batch == 0 || args.channels == 0) return {out, out_moments};
  args.x = x.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.moments_out = moments ? static_cast<float*>(out_moments.mutable_data_ptr()) : nullptr;
  args.pool = pool();
  report(chosen_kernels().embed(args));
  return {out, out_moments};
}

void choose_products(riformer::cpu::BlockArgs& args, bool int8) {
  args.int8 = int8;
  if (int8 && args.channels > riformer::cpu::kLongestInt8Sum)
    fail("riformer::block: int8 is true with ", args.channels, " channels, expected at most ",
         riformer::cpu::kLongestInt8Sum, ": longer sums of bytes exceed 32 bits; leave it false");
}

std::tuple<Tensor, Tensor> block(const Tensor& x, const OptionalTensor& moments, RIFORMER_BLOCK_PARAMETERS) {
  Parameters parameters;
  riformer::cpu::BlockArgs args{};
  describe_block(args, parameters, x, RIFORMER_BLOCK_ARGUMENTS);
  choose_products(args, int8);
  args.pool = pool();
  Tensor held;
  args.moments = moments_data(moments, x, per_position, held);
  Tensor out = like(x, x.scalar_type());
  Tensor out_moments = new_moments(x, per_position ? 0 : args.channels);
  if (args.batch * args.positions > 0) {
    const Tensor tokens = torch::stable::contiguous(x);
    args.x = tokens.const_data_ptr();
    args.out = out.mutable_data_ptr();
    args.moments_out = per_position ? nullptr : static_cast<float*>(out_moments.mutable_data_ptr());
    report(chosen_kernels().block(args));
  }
  return {in_layout_of(x, out), out_moments};
}

// The trailing underscore is PyTorch's mark of an op that writes over its arguments.
void block_(Tensor x, OptionalTensor moments, RIFORMER_BLOCK_PARAMETERS) {
  Parameters parameters;
  riformer::cpu::BlockArgs args{};
  describe_block(args, parameters, x, RIFORMER_BLOCK_ARGUMENTS);
  choose_products(args, int8);
  args.pool = pool();
  Tensor held;
  args.moments = moments_data(moments, x, per_position, held);
  if (args.batch * args.positions == 0) return;
  const bool direct = x.is_contiguous();
  Tensor tokens = direct ? x : torch::stable::contiguous(x);
  args.x = tokens.const_data_ptr();
  args.out = tokens.mutable_data_ptr();
  args.moments_out = per_position ? nullptr : static_cast<float*>(held.mutable_data_ptr());
  report(chosen_kernels().block(args));
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
  describe_tokens(args, x);
  args.moments = moments_data(moments, x, per_position, held);
  describe_norm(args, parameters, weight, bias, eps, per_position);
  args.pool = pool();
  Tensor out = like(x, dtype);
  if (args.batch * args.positions * args.channels > 0) {
    const Tensor tokens = torch::stable::contiguous(x);
    args.x = tokens.const_data_ptr();
    args.out = out.mutable_data_ptr();
    report(chosen_kernels().norm(args));
  }
  return in_layout_of(x, out);
}

Tensor head(const Tensor& x, const OptionalTensor& moments, const Tensor& norm_weight, const Tensor& norm_bias,
            double eps, const Tensor& fc_weight, const OptionalTensor& fc_bias, bool per_position, ScalarType dtype) {
  check_tokens(x, "head");
  Parameters parameters;
  Tensor held;
  riformer::cpu::HeadArgs args{};
  args.x_dtype = dtype_of(x.scalar_type(), "x");
  args.dtype = dtype_of(dtype, "the result");
  describe_tokens(args, x);
  args.moments = moments_data(moments, x, per_position, held);
  describe_head(args, parameters, norm_weight, norm_bias, eps, fc_weight, fc_bias, per_position);
  args.pool = pool();
  Tensor out = torch::stable::empty({args.batch, args.classes}, dtype, std::nullopt, x.device());
  if (args.batch * args.classes == 0) return out;
  if (args.positions * args.channels == 0)
    fail("riformer::head: x has shape ", shape_of(x), ": there is nothing to pool");
  Tensor tokens = per_position ? torch::stable::contiguous(x) : x;
  args.x = tokens.const_data_ptr();
  args.out = out.mutable_data_ptr();
  report(chosen_kernels().head(args));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(riformer, CPU, library) { RIFORMER_FOR_EACH_OP(RIFORMER_REGISTER_OP) }

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
