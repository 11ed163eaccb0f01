// Which instruction set this process uses: the first automatic one of instruction_sets.def whose features the processor
// and the operating system offer, or the one that RIFORMER_CPU_ISA names. Decided when one of these
// functions is first called.
#pragma once

#include <string>

#include "kernels.h"

namespace riformer::cpu {

// The kernels in use; null when RIFORMER_CPU_ISA names a set that cannot run here.
const Kernels* kernels();

// JSON for Python: `chosen`; the instruction sets `supported` here and `compiled`, best first; `features` of the
// machine; `error`, why RIFORMER_CPU_ISA cannot be followed.
std::string describe();

// Uses the instruction set `name` from now on; "" is the automatic choice. Returns an empty string, or the reason why
// it cannot be used; then nothing changes.
std::string select(const char* name);

}  // namespace riformer::cpu
