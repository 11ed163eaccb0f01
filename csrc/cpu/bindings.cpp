// The only file of the CPU library that knows torch: checks the arguments of the ops, lays out tensors, and calls the
// chosen kernels. Built on the LibTorch stable ABI, so that one library serves every torch from 2.10 on.
#include <string>
#include <tuple>
#include <vector>

#include "../common/arguments.h"
#include "../common/ops.h"
#include "dispatch.h"

bool riformer::serves(DType) { return true; }
bool riformer::serves_int8() { return true; }

namespace {

using namespace riformer;
using riformer::cpu::Kernels;
using riformer::cpu::Parameter;

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

void report(int64_t outcome) {
  if (outcome < 0)
    fail("riformer::block: ", (-outcome - 1) % 2 ? "fc2" : "fc1", "_weight has a value in row ", (-outcome - 1) / 2,
         " that is not finite, and no scale makes int8 of that; products in float let it through "
         "(compute_dtype=torch.bfloat16)");
  if (outcome) fail("riformer: out of memory: ", outcome, " bytes of working memory could not be had");
}

// Hands parameters to the kernels and keeps them alive, contiguous copies too, while the kernels read them.
struct Parameters {
  std::vector<Tensor> held;

  Parameter vector(const OptionalTensor& tensor, int64_t count, const char* name) {
    if (!tensor.has_value()) return {};
    check_vector(*tensor, count, name);
    return hold(*tensor, name);
  }
  Parameter matrix(const Tensor& tensor, int64_t rows, int64_t columns, const char* name) {
    return check_matrix(tensor, rows, columns, name) ? keep(tensor, name) : hold(tensor, name);
  }
  // The tensor or, where it is not contiguous, a contiguous copy.
  Parameter hold(const Tensor& tensor, const char* name) {
    return keep(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor), name);
  }
  // The tensor as it lies in memory.
  Parameter keep(const Tensor& tensor, const char* name) {
    if (!tensor.is_cpu()) fail("riformer: ", name, " is not on the CPU, the tokens are");
    held.push_back(tensor);
    return {tensor.const_data_ptr(), dtype_of(tensor.scalar_type(), name)};
  }
};

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
    report(kernels().moments(args));
  }
  return out;
}

std::tuple<Tensor, Tensor> embed(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t stride,
                                 int64_t padding, ScalarType dtype, bool moments) {
  riformer::cpu::EmbedArgs args{};
  describe_embed(args, x, weight, stride, padding);
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
  args.out = out.mutable_data_ptr();
  args.moments_out = moments ? static_cast<float*>(out_moments.mutable_data_ptr()) : nullptr;
  args.pool = pool();
  report(kernels().embed(args));
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
    report(kernels().block(args));
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
  report(kernels().block(args));
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
    report(kernels().norm(args));
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
  if (args.positions * args.channels == 0)
    fail("riformer::head: x has shape ", shape_of(x), ": there is nothing to pool");
  Tensor tokens = per_position ? torch::stable::contiguous(x) : x;
  args.x = tokens.const_data_ptr();
  args.out = out.mutable_data_ptr();
  report(kernels().head(args));
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
