// Which instruction set this process uses. Decided once, from what the machine and the operating system allow.
#pragma once

#include <string>

#include "kernels.h"

namespace riformer::cpu {

// The kernels in use; null when RIFORMER_CPU_ISA names a set that cannot run here.
const Kernels* kernels();

// JSON: chosen, supported, compiled, features, error.
std::string describe();

// Use `name` from now on ("" for the automatic choice). Returns an empty string, or why not; then nothing changes.
std::string select(const char* name);

}  // namespace riformer::cpu
