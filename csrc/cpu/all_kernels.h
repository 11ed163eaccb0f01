// Every kernel, for the instruction set that RIFORMER_ISA names, and the table of them that dispatch.cpp chooses from.
// The last include of each kernels_*.cpp.
#pragma once

#include "block.h"
#include "embed.h"
#include "head.h"
#include "norm.h"

namespace riformer::RIFORMER_ISA {

#define RIFORMER_KERNEL(op, Args) op,
const cpu::Kernels kKernels = {RIFORMER_FOR_EACH_KERNEL(RIFORMER_KERNEL)};
#undef RIFORMER_KERNEL

}  // namespace riformer::RIFORMER_ISA
