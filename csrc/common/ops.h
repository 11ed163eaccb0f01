// The ops, in one table. Whatever has to name every op is made from it: the bindings of the CPU and of the CUDA library
// register from it, and the tables of CPU kernels are filled from it. So an op that is added here and forgotten
// elsewhere does not compile.
#pragma once

// ENTRY(op, Args) for every kernel: `op` is the name of the op (riformer::op), of the function in bindings.cpp that
// checks its arguments, and of the kernel that takes them as one `Args` (kernels.h of each library).
#define RIFORMER_FOR_EACH_KERNEL(ENTRY) \
  ENTRY(moments, MomentsArgs)           \
  ENTRY(embed, EmbedArgs)               \
  ENTRY(block, BlockArgs)               \
  ENTRY(norm, NormArgs)                 \
  ENTRY(head, HeadArgs)

// ENTRY(op, Args) for every op. `block_` is `block` that writes over its tokens: the same kernel, given another output.
#define RIFORMER_FOR_EACH_OP(ENTRY) \
  RIFORMER_FOR_EACH_KERNEL(ENTRY)   \
  ENTRY(block_, BlockArgs)

// Registers every op with the function of its name; `library` is that of STABLE_TORCH_LIBRARY_IMPL.
#define RIFORMER_REGISTER_OP(op, Args) library.impl(#op, TORCH_BOX(&op));
