// Which kernels a block runs: pure functions of the problem, no GPU needed.
//
// The family depends on channels, hidden, dtype and architecture alone. Within a family the forms give the same bits,
// as every sum is one chain over k upwards in the same steps; so the form may depend on how many rows there are, and an
// image still has the same result in every batch.
//
// The entries are estimates from registers, shared memory and operations; none has been timed yet.
#pragma once

#include <cstdint>
#include <string>

#include "block_args.h"

namespace riformer::cuda {

enum class BlockFamily { float32, sm80, sm90 };
// One kernel; or two with the hidden tensor in memory, in tiles for many rows or for few.
enum class BlockForm { fused, pair_wide, pair_narrow };

struct BlockProblem {
  int64_t channels, hidden, positions, rows;
  DType dtype;
  bool per_position;
  int architecture, processors;

  std::string text() const;
};

struct BlockChoice {
  BlockFamily family;
  BlockForm form;
  int64_t slots_per_image;  // of BlockKernelArgs
};

BlockChoice choose_block(const BlockProblem& problem);
std::string choice_text(const BlockProblem& problem, const BlockChoice& choice);

// Into how many thread blocks the columns of one row tile are divided: the divisor of `tiles` that needs the least time
// on `processors`, where every division repeats the prologue.
int expand_splits(int64_t groups, int tiles, int processors);

// Whether code for sm_90a is in this library.
bool has_sm90();
std::string describe_block_sm90(BlockForm form, int64_t channels, int64_t hidden);
void launch_block_sm90(BlockForm form, DType dtype, const BlockKernelArgs& block, const Device& device);

}  // namespace riformer::cuda
