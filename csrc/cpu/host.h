// What bindings.cpp and network_bindings.cpp share: the chosen kernels, PyTorch's threads, and parameters that are
// checked and kept alive. For bindings only: it includes torch.
#pragma once

#include <vector>

#include "../common/arguments.h"
#include "dispatch.h"

namespace riformer::cpu {

// The kernels of the chosen instruction set.
inline const Kernels& chosen_kernels() {
  const Kernels* chosen = kernels();
  if (!chosen) fail("riformer: no CPU kernels are selected: ", describe());
  return *chosen;
}

inline Pool pool() {
  const auto run = [](int64_t count, void (*task)(int64_t, int64_t, void*), void* context) {
    torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) { task(begin, end, context); });
  };
  return {run, static_cast<int64_t>(torch::stable::get_num_threads())};
}

// Throws what the outcome of a kernel stands for (Kernels in kernels.h); nothing for 0.
inline void report(int64_t outcome) {
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

// Checks and fills in what a convolution needs besides its images: sizes, weight and bias.
inline void describe_weights(EmbedArgs& args, Parameters& parameters, const Tensor& weight, const OptionalTensor& bias,
                             int64_t stride, int64_t padding) {
  describe_convolution(args, weight, stride, padding);
  // The kernel takes input channels two at a time; with an odd number the taps' order must be the contiguous one.
  args.weight_channels_last = is_channels_last(weight) && args.in_channels % 2 == 0;
  args.weight = args.weight_channels_last ? parameters.keep(weight, "weight") : parameters.hold(weight, "weight");
  args.bias = parameters.vector(bias, args.channels, "bias");
}

// Fills in the parameters of the norm of the tokens that `args` describes.
inline void describe_norm(NormArgs& args, Parameters& parameters, const Tensor& weight, const Tensor& bias, double eps,
                          bool per_position) {
  args.weight = parameters.vector(weight, args.channels, "weight");
  args.bias = parameters.vector(bias, args.channels, "bias");
  args.eps = eps;
  args.per_position = per_position;
}

// Fills in the parameters of the head over the tokens that `args` describes.
inline void describe_head(HeadArgs& args, Parameters& parameters, const Tensor& norm_weight, const Tensor& norm_bias,
                          double eps, const Tensor& fc_weight, const OptionalTensor& fc_bias, bool per_position) {
  args.classes = fc_weight.dim() > 0 ? fc_weight.size(0) : 0;
  args.norm_weight = parameters.vector(norm_weight, args.channels, "norm_weight");
  args.norm_bias = parameters.vector(norm_bias, args.channels, "norm_bias");
  args.eps = eps;
  args.fc_weight = parameters.matrix(fc_weight, args.classes, args.channels, "fc_weight");
  args.fc_bias = parameters.vector(fc_bias, args.classes, "fc_bias");
  args.per_position = per_position;
}

}  // namespace riformer::cpu
