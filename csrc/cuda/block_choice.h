// Which kernels a block runs: pure functions of the problem, for which no GPU is needed.
//
// The family depends on channels, hidden, dtype and architecture alone. All forms of a family give the same bits,
// because every sum is one chain over k upwards in the same steps. So the form may depend on the number of rows too,
// and an image still has the same result in every batch.
//
// The thresholds are estimates from registers, shared memory and operations. None of them has been timed yet.
#pragma once

#include <cstdint>
#include <string>

#include "kernels.h"

namespace riformer::cuda {

enum class BlockFamily { float32, sm80, sm90 };
// One kernel (fused), or a pair of kernels with the hidden tensor in memory: with wide tiles for many rows, or with
// narrow ones for few.
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
  int64_t slots_per_image;  // see BlockKernelArgs
};

BlockChoice choose_block(const BlockProblem& problem);
std::string choice_text(const BlockProblem& problem, const BlockChoice& choice);

// `groups` of rows times `tiles` of columns are shared out to thread blocks: into how many thread blocks each group is
// split. The result divides `tiles`. It is the split that takes the least time on `processors`, where each thread block
// first norms its rows.
int expand_splits(int64_t groups, int tiles, int processors);

// Whether this library has code for sm_90a.
bool has_sm90();

}  // namespace riformer::cuda
