// Stand-ins for the functions of the CUDA runtime that a launch needs, without its headers, which define some of them.
// Enumerators are their numbers: 97 is cudaDevAttrMaxSharedMemoryPerBlockOptin, 8
// cudaFuncAttributeMaxDynamicSharedMemorySize.
#include <atomic>

std::atomic<int> calls{0}, wrong{0};
thread_local int device = 0;

namespace {
constexpr int kMost = 232448;
}

extern "C" {
int cudaGetDevice(int* found) {
  *found = device;
  return 0;
}
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 97 ? kMost : 0;
  return 0;
}
int cudaFuncSetAttribute(const void*, int attribute, int value) {
  ++calls;
  if (attribute != 8 || value != kMost) ++wrong;
  return 0;
}
int cudaGetLastError() { return 0; }
const char* cudaGetErrorString(int) { return ""; }
const char* cudaGetErrorName(int) { return ""; }

// What nvcc's own code calls before main and after it.
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
}
