// What the kernels of one instruction set offer, in plain pointers and sizes. Nothing here knows about torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/dtypes.h"
#include "../common/ops.h"

namespace riformer::cpu {

// PyTorch's threads. run() calls task(begin, end, context) for parts of [0, count), on several threads at once.
struct Pool {
  void (*run)(int64_t count, void (*task)(int64_t begin, int64_t end, void* context), void* context);
  int64_t threads;
};

// A parameter in its own dtype and memory, row-major; data is null where it is absent.
struct Parameter {
  const void* data = nullptr;
  DType dtype = DType::f32;
};

// Tokens are [batch, channels, positions], positions contiguous. Moments are [batch, 2, channels]: mean, then centred
// sum of squares.
struct BlockArgs {
  const void* x;
  void* out;  // may be x
  DType dtype;
  int64_t batch, channels, positions, hidden;
  const float* moments;  // null with per_position
  float* moments_out;    // null with per_position
  Parameter layer_scale_1, norm1_weight, norm1_bias, affine_weight, affine_bias;
  double eps1;
  Parameter norm2_weight, norm2_bias;
  double eps2;
  Parameter fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale_2;
  bool per_position, residual, int8;
  Pool pool;
};

struct EmbedArgs {
  const void* x;
  DType x_dtype;
  int64_t batch, in_channels, height, width;
  int64_t stride_batch, stride_channel, stride_row, stride_column;  // of x, in elements
  Parameter weight, bias;
  bool weight_channels_last;  // weight is [channels][kernel_height][kernel_width][in_channels]; in_channels is even
  int64_t channels, kernel_height, kernel_width, stride, padding, out_height, out_width;
  void* out;
  DType dtype;
  float* moments_out;  // null when not wanted
  Pool pool;
};

struct NormArgs {
  const void* x;
  DType x_dtype;
  void* out;
  DType dtype;
  int64_t batch, channels, positions;
  const float* moments;
  Parameter weight, bias;
  double eps;
  bool per_position;
  Pool pool;
};

struct HeadArgs {
  const void* x;
  DType x_dtype;
  int64_t batch, channels, positions, classes;
  const float* moments;
  Parameter norm_weight, norm_bias;
  double eps;
  Parameter fc_weight, fc_bias;
  bool per_position;
  void* out;
  DType dtype;
  Pool pool;
};

struct MomentsArgs {
  const void* x;
  DType dtype;
  int64_t batch, channels, positions;
  float* moments_out;
  Pool pool;
};

// A longer sum of products of bytes, each at most 255 * 127, could exceed int32.
constexpr int64_t kLongestInt8Sum = 2147483647 / (255 * 127);

// What a block returns that found a value in a row of a weight that is not finite: `which` is 0 for fc1, 1 for fc2.
constexpr int64_t not_finite(int which, int64_t row) { return -(2 * row + which) - 1; }

// The kernels of one instruction set. Each returns 0 on success, the bytes of memory that it could not get, or
// not_finite(...).
struct Kernels {
#define RIFORMER_KERNEL_POINTER(op, Args) int64_t (*op)(const Args&);
  RIFORMER_FOR_EACH_KERNEL(RIFORMER_KERNEL_POINTER)
#undef RIFORMER_KERNEL_POINTER
};

// Working memory of the calling thread, at least `bytes`, 64-byte aligned; null when memory is out. Valid until the
// thread's next call for the same slot: 0 is a task's own memory, 1 is what a caller shares with the threads that it
// starts, 2 is the tokens of a whole network. The memory is kept between calls, since the blocks of a stage ask for the
// same amount over and over.
void* thread_scratch(int64_t bytes, int slot = 0);

}  // namespace riformer::cpu

// RIFORMER_ON_x86(text) is the text where the compiler's target is x86, and nothing elsewhere.
#define RIFORMER_ON_any(...) __VA_ARGS__
#ifdef __x86_64__
#define RIFORMER_ON_x86(...) __VA_ARGS__
#else
#define RIFORMER_ON_x86(...)
#endif
#ifdef __aarch64__
#define RIFORMER_ON_aarch64(...) __VA_ARGS__
#else
#define RIFORMER_ON_aarch64(...)
#endif

// riformer::avx2::kKernels and so on: the table of each instruction set. all_kernels.h defines it.
namespace riformer {
#define SET(architecture, space, ...) \
  RIFORMER_ON_##architecture(namespace space { extern const cpu::Kernels kKernels; })
#include "instruction_sets.def"
}  // namespace riformer
