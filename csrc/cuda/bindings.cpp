// The ops of the CUDA library as PyTorch calls them, and with host.h the only code of it that knows torch. The
// functions here check the arguments of the ops, lay out tensors, take memory from PyTorch's allocator, and start the
// kernels on the current stream of the tokens' device. Built on the LibTorch stable ABI. With RIFORMER_EMULATED the
// same file makes ops on CPU tensors, whose kernels run on the emulator, for the tests.
#include <string>
#include <tuple>
#include <vector>

#include "../common/ops.h"
#include "host.h"

bool riformer::serves(DType dtype) { return cuda::kernels_serve(dtype); }
bool riformer::serves_int8() { return false; }

namespace {

using namespace riformer;
using riformer::cuda::Call;
using riformer::cuda::Parameter;
using riformer::cuda::served;

constexpr int64_t kAlignment = 16;

// A clone keeps dense strides.
Tensor aligned(const Tensor& tensor) {
  const bool fits = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kAlignment == 0;
  return fits ? tensor : torch::stable::clone(tensor);
}

Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

std::string place_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return "the CPU";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return "another kind of device";
}

void check_served(const Tensor& x, const char* op) {
  if (!served(x)) fail("riformer::", op, ": x is on ", place_of(x), " and other arguments are not; move it to theirs");
}

void check_place(const Tensor& tensor, const Tensor& x, const char* name) {
  if (!served(tensor) || tensor.get_device_index() != x.get_device_index())
    fail("riformer: ", name, " is on ", place_of(tensor), " and the tokens are on ", place_of(x), "; move one of them");
}

void check_width(int64_t channels, const char* op) {
  if (channels % 8)
    fail("riformer::", op, ": ", channels,
         " channels, expected a multiple of 8; use backend='reference' for other widths");
}

// Whether the channels of a position are contiguous and the positions follow each other. A dimension of size 1 may have
// any stride.
bool is_token_layout(const Tensor& x) {
  const int64_t c = x.size(1), h = x.size(2), w = x.size(3);
  return (c == 1 || x.stride(1) == 1) && (w == 1 || x.stride(3) == c) && (h == 1 || x.stride(2) == w * c) &&
         (x.size(0) == 1 || x.stride(0) == h * w * c);
}

// [B, C, H, W] as the kernels read it: rows of channels, 16-byte aligned. Copied only if x does not lie so.
Tensor as_tokens(const Tensor& x) {
  return aligned(is_token_layout(x) ? x : torch::stable::contiguous(x, MemoryFormat::ChannelsLast));
}

// A result with contiguous channels. Both memory formats have them where there is one position or none; then the result
// has the format of x.
Tensor new_tokens(const Tensor& x, ScalarType dtype) {
  const bool channels_last = is_channels_last(x) || (x.size(2) * x.size(3) != 1 && x.numel() != 0);
  return empty_tokens(x, dtype, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// `result` in the memory format of x. Copied only if that is NCHW.
Tensor in_layout_of(const Tensor& x, const Tensor& result) { return is_channels_last(x) ? result : dense(result); }

// The parameters of a call as the kernels read them; copies stay alive here until the launch.
class Parameters {
 public:
  Parameters(const Call& call, const Tensor& x, DType dtype) : call_(call), x_(x), dtype_(dtype) {}

  Parameter vector(const OptionalTensor& tensor, int64_t count, const char* name) {
    if (!tensor.has_value()) return {};
    check_vector(*tensor, count, name);
    return hold(*tensor, name);
  }
  // A matrix in the tokens' dtype, row-major.
  const void* matrix(const Tensor& tensor, int64_t rows, int64_t columns, const char* name) {
    const bool row_major = check_matrix(tensor, rows, columns, name);
    return converted(row_major ? tensor : torch::stable::contiguous(tensor), name);
  }
  // The weight of a convolution [C, Cin, KH, KW], as [C, KH, KW, Cin]. A model in channels_last has it so already.
  const void* taps(const Tensor& tensor, const char* name) {
    const bool in_order = is_token_layout(tensor);
    return converted(in_order ? tensor : torch::stable::contiguous(tensor, MemoryFormat::ChannelsLast), name);
  }
  Parameter hold(const Tensor& tensor, const char* name) {
    check_place(tensor, x_, name);
    held_.push_back(dense(tensor));
    return {held_.back().const_data_ptr(), dtype_of(tensor.scalar_type(), name)};
  }

 private:
  const void* converted(const Tensor& tensor, const char* name) {
    check_place(tensor, x_, name);
    const DType own = dtype_of(tensor.scalar_type(), name);
    if (own == dtype_) {
      held_.push_back(aligned(tensor));
      return held_.back().const_data_ptr();
    }
    held_.push_back(tensor);
    const int64_t count = tensor.numel();
    held_.push_back(torch::stable::empty({count}, scalar_type_of(dtype_), std::nullopt, tensor.device()));
    void* out = held_.back().mutable_data_ptr();
    riformer::cuda::convert(call_.device(), tensor.const_data_ptr(), own, out, dtype_, count);
    return out;
  }

  const Call& call_;
  const Tensor& x_;
  DType dtype_;
  std::vector<Tensor> held_;
};

// The moments, contiguous and aligned; undefined with per_position.
Tensor dense_moments(const OptionalTensor& moments, const Tensor& x, bool per_position) {
  if (per_position) return Tensor();
  check_moments(moments, x);
  check_place(*moments, x, "moments");
  return aligned(dense(*moments));
}

const float* data_of(const Tensor& moments) {
  return moments.defined() ? static_cast<const float*>(moments.const_data_ptr()) : nullptr;
}

// Checks tokens and describes them: what every op on tokens begins with.
template <class Args>
Args args_on(const Tensor& x, const char* op) {
  check_tokens(x, op);
  check_served(x, op);
  check_width(x.size(1), op);
  Args args{};
  args.dtype = dtype_of(x.scalar_type(), "x");
  describe_tokens(args, x);
  return args;
}

Tensor moments(const Tensor& x) {
  auto args = args_on<riformer::cuda::MomentsArgs>(x, "moments");
  Call call(x);
  Tensor out = new_moments(x, args.channels);
  if (args.batch * args.channels == 0) return out;
  if (args.positions == 0)
    fail("riformer::moments: x has shape ", shape_of(x), ": moments of no positions do not exist");
  const Tensor tokens = as_tokens(x);
  args.device = call.device();
  args.x = tokens.const_data_ptr();
  args.moments = static_cast<float*>(call.result(out));
  args.workspace = call.workspace(moments_workspace(args), x);
  riformer::cuda::moments(args);
  call.finish();
  return out;
}

std::tuple<Tensor, Tensor> embed(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t stride,
                                 int64_t padding, ScalarType dtype, bool moments) {
  riformer::cuda::EmbedArgs args{};
  describe_embed(args, x, weight, stride, padding);
  check_served(x, "embed");
  check_width(args.channels, "embed");
  args.dtype = dtype_of(dtype, "the result");
  args.x_dtype = dtype_of(x.scalar_type(), "x");
  Call call(x);
  Tensor out = torch::stable::empty({args.batch, args.channels, args.out_height, args.out_width}, dtype, std::nullopt,
                                    x.device(), std::nullopt, MemoryFormat::ChannelsLast);
  Tensor out_moments = new_moments(x, moments ? args.channels : 0);
  if (args.batch == 0 || args.channels == 0) return {out, out_moments};
  Parameters parameters(call, x, args.dtype);
  args.device = call.device();
  args.weight = parameters.taps(weight, "weight");
  args.bias = parameters.vector(bias, args.channels, "bias");
  args.x = x.const_data_ptr();
  args.out = call.result(out);
  args.moments = moments ? static_cast<float*>(call.result(out_moments)) : nullptr;
  args.workspace = call.workspace(embed_workspace(args), x);
  riformer::cuda::embed(args);
  call.finish();
  return {out, out_moments};
}

std::tuple<Tensor, Tensor> block(const Tensor& x, const OptionalTensor& moments, RIFORMER_BLOCK_PARAMETERS) {
  check_served(x, "block");
  Call call(x);
  Parameters parameters(call, x, dtype_of(x.scalar_type(), "x"));
  riformer::cuda::BlockArgs args{};
  args.device = call.device();
  describe_block(args, parameters, x, RIFORMER_BLOCK_ARGUMENTS);
  const Tensor statistics = dense_moments(moments, x, per_position);
  Tensor out = new_tokens(x, x.scalar_type());
  Tensor out_moments = new_moments(x, per_position ? 0 : args.channels);
  if (args.batch * args.positions > 0) {
    const Tensor tokens = as_tokens(x);
    args.x = tokens.const_data_ptr();
    args.out = call.result(out);
    args.moments = data_of(statistics);
    args.moments_out = per_position ? nullptr : static_cast<float*>(call.result(out_moments));
    args.workspace = call.workspace(block_workspace(args), x);
    riformer::cuda::block(args);
    call.finish();
  }
  return {in_layout_of(x, out), out_moments};
}

// The trailing underscore is PyTorch's mark of an op that writes over its arguments.
void block_(Tensor x, OptionalTensor moments, RIFORMER_BLOCK_PARAMETERS) {
  check_served(x, "block");
  Call call(x);
  Parameters parameters(call, x, dtype_of(x.scalar_type(), "x"));
  riformer::cuda::BlockArgs args{};
  args.device = call.device();
  describe_block(args, parameters, x, RIFORMER_BLOCK_ARGUMENTS);
  const Tensor statistics = dense_moments(moments, x, per_position);
  if (args.batch * args.positions == 0) return;
  const Tensor tokens = as_tokens(x);
  args.x = tokens.const_data_ptr();
  args.out = tokens.mutable_data_ptr();
  args.moments = data_of(statistics);
  args.moments_out = per_position ? nullptr : static_cast<float*>(statistics.mutable_data_ptr());
  args.workspace = call.workspace(block_workspace(args), x);
  riformer::cuda::block(args);
  call.finish();
  if (args.out != x.const_data_ptr()) torch::stable::copy_(x, tokens);
  if (!per_position && args.moments != moments->const_data_ptr()) torch::stable::copy_(*moments, statistics);
}

Tensor norm(const Tensor& x, const OptionalTensor& moments, const Tensor& weight, const Tensor& bias, double eps,
            bool per_position, ScalarType dtype) {
  auto args = args_on<riformer::cuda::NormArgs>(x, "norm");
  args.out_dtype = dtype_of(dtype, "the result");
  Call call(x);
  Parameters parameters(call, x, args.dtype);
  args.device = call.device();
  const Tensor statistics = dense_moments(moments, x, per_position);
  args.moments = data_of(statistics);
  args.weight = parameters.vector(weight, args.channels, "weight");
  args.bias = parameters.vector(bias, args.channels, "bias");
  args.eps = static_cast<float>(eps);
  args.per_position = per_position;
  Tensor out = new_tokens(x, dtype);
  if (args.batch * args.positions * args.channels > 0) {
    const Tensor tokens = as_tokens(x);
    args.x = tokens.const_data_ptr();
    args.out = call.result(out);
    riformer::cuda::norm(args);
    call.finish();
  }
  return in_layout_of(x, out);
}

Tensor head(const Tensor& x, const OptionalTensor& moments, const Tensor& norm_weight, const Tensor& norm_bias,
            double eps, const Tensor& fc_weight, const OptionalTensor& fc_bias, bool per_position, ScalarType dtype) {
  auto args = args_on<riformer::cuda::HeadArgs>(x, "head");
  args.out_dtype = dtype_of(dtype, "the result");
  args.classes = fc_weight.dim() > 0 ? fc_weight.size(0) : 0;
  Call call(x);
  Parameters parameters(call, x, args.dtype);
  args.device = call.device();
  const Tensor statistics = dense_moments(moments, x, per_position);
  args.moments = data_of(statistics);
  args.norm_weight = parameters.vector(norm_weight, args.channels, "norm_weight");
  args.norm_bias = parameters.vector(norm_bias, args.channels, "norm_bias");
  args.eps = static_cast<float>(eps);
  check_matrix(fc_weight, args.classes, args.channels, "fc_weight");
  args.fc_weight = parameters.hold(fc_weight, "fc_weight");
  args.fc_bias = parameters.vector(fc_bias, args.classes, "fc_bias");
  args.per_position = per_position;
  Tensor out = torch::stable::empty({args.batch, args.classes}, dtype, std::nullopt, x.device());
  if (args.batch * args.classes == 0) return out;
  if (args.positions * args.channels == 0)
    fail("riformer::head: x has shape ", shape_of(x), ": there is nothing to pool");
  const Tensor tokens = per_position ? as_tokens(x) : x;
  args.x = tokens.const_data_ptr();
  args.out = call.result(out);
  args.workspace = call.workspace(head_workspace(args), x);
  riformer::cuda::head(args);
  call.finish();
  return out;
}

}  // namespace

#if defined(RIFORMER_EMULATED)
STABLE_TORCH_LIBRARY_IMPL(riformer_emulated, CPU, library) {
#else
STABLE_TORCH_LIBRARY_IMPL(riformer_cuda, CUDA, library) {
#endif
  RIFORMER_FOR_EACH_OP(RIFORMER_REGISTER_OP)
}

// For Python, through ctypes. A returned text is valid until the calling thread's next call of the same function.
#define RIFORMER_EXPORT extern "C" __attribute__((visibility("default")))

RIFORMER_EXPORT const char* riformer_cuda_architectures() { return RIFORMER_ARCHITECTURES; }

// Which kernels `block` would run, as block_choice (kernels.h) says it, or why it would run none. `dtype` is a DType.
RIFORMER_EXPORT const char* riformer_cuda_choice(int64_t batch, int64_t channels, int64_t hidden, int64_t positions,
                                                 int dtype, int architecture, int processors) {
  static thread_local std::string text;
  riformer::cuda::BlockArgs args{};
  args.device = {architecture, processors, nullptr};
  args.dtype = static_cast<DType>(dtype);
  args.batch = batch;
  args.positions = positions;
  args.channels = channels;
  args.hidden = hidden;
  try {
    text = riformer::cuda::block_choice(args);
  } catch (const std::exception& error) {
    text = error.what();
  }
  return text.c_str();
}

#if defined(RIFORMER_EMULATED)
RIFORMER_EXPORT void riformer_cuda_set_device(int architecture, int processors) {
  riformer::cuda::emulated_device() = {architecture, processors, nullptr};
}
RIFORMER_EXPORT void riformer_cuda_set_seed(uint64_t seed) { riformer::emulator::set_seed(seed); }
#else
RIFORMER_EXPORT int riformer_cuda_serves(int architecture) { return riformer::cuda::compiled_for(architecture); }

// Why the driver cannot run this library, or an empty text. No CUDA context is created for it.
RIFORMER_EXPORT const char* riformer_cuda_driver_error() {
  static thread_local std::string text;
  text.clear();
  int driver = 0, runtime = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || cudaRuntimeGetVersion(&runtime) != cudaSuccess) {
    text = "the CUDA driver does not answer";
  } else if (driver / 1000 < runtime / 1000) {
    text = "it was built with CUDA " + std::to_string(runtime / 1000) + "." + std::to_string(runtime % 1000 / 10) +
           ", the driver of this machine is for CUDA " + std::to_string(driver / 1000) + "." +
           std::to_string(driver % 1000 / 10);
  }
  return text.c_str();
}
#endif
