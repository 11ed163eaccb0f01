// The CUDA runtime as the host code of csrc/cuda sees it, without a GPU: launches and tensor maps go to Python.
//
// It has only what that code calls. `ptx_hooks` sets the two callbacks. A callback returns 0, or the call fails.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <string>

namespace {

constexpr int kMostShared = 232448;  // bytes of a thread block (CUDA programming guide, compute capability 9.0)

std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> known;
  return known;
}
std::map<const void*, int>& shared_limits() {
  static std::map<const void*, int> known;
  return known;
}

struct LaunchRecord {
  const char* kernel;
  unsigned grid[3], block[3], cluster[3];
  unsigned long long shared;
  int shared_allowed;  // by cudaFuncSetAttribute, or 48 KiB
  void** arguments;
};
struct MapRecord {
  void* map;
  int type, rank, interleave, swizzle, promotion, fill;
  unsigned long long base;
  const unsigned long long *sizes, *strides;
  const unsigned *box, *steps;
};
using LaunchHook = int (*)(const LaunchRecord*);
using MapHook = int (*)(const MapRecord*);
LaunchHook on_launch = nullptr;
MapHook on_map = nullptr;

CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                CUtensorMapFloatOOBfill fill) {
  static_assert(sizeof(cuuint64_t) == sizeof(unsigned long long), "passed as it is");
  const MapRecord record{map,
                         static_cast<int>(type),
                         static_cast<int>(rank),
                         static_cast<int>(interleave),
                         static_cast<int>(swizzle),
                         static_cast<int>(promotion),
                         static_cast<int>(fill),
                         reinterpret_cast<unsigned long long>(base),
                         reinterpret_cast<const unsigned long long*>(sizes),
                         reinterpret_cast<const unsigned long long*>(strides),
                         box,
                         steps};
  return on_map(&record) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

int launch(const void* function, const unsigned* grid, const unsigned* block, const unsigned* cluster,
           unsigned long long shared, void** arguments) {
  const auto found = kernels().find(function);
  if (found == kernels().end()) return cudaErrorInvalidDeviceFunction;
  LaunchRecord record{};
  record.kernel = found->second.c_str();
  std::memcpy(record.grid, grid, sizeof record.grid);
  std::memcpy(record.block, block, sizeof record.block);
  std::memcpy(record.cluster, cluster, sizeof record.cluster);
  record.shared = shared;
  record.shared_allowed = shared_limits().count(function) ? shared_limits()[function] : 48 * 1024;
  record.arguments = arguments;
  return on_launch(&record) ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void ptx_hooks(LaunchHook launch_hook, MapHook map_hook) {
  on_launch = launch_hook;
  on_map = map_hook;
}

// What nvcc's host code registers before main.
void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernels()[host] = device;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
char __cudaInitModule(void**) { return 1; }
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, struct CUstream_st*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t) {
  const unsigned g[3] = {grid.x, grid.y, grid.z}, b[3] = {block.x, block.y, block.z}, c[3] = {1, 1, 1};
  return static_cast<cudaError_t>(launch(function, g, b, c, shared, arguments));
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  const unsigned g[3] = {config->gridDim.x, config->gridDim.y, config->gridDim.z};
  const unsigned b[3] = {config->blockDim.x, config->blockDim.y, config->blockDim.z};
  unsigned c[3] = {1, 1, 1};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id != cudaLaunchAttributeClusterDimension)
      return cudaErrorInvalidValue;  // the interpreter knows no other
    c[0] = attribute.val.clusterDim.x;
    c[1] = attribute.val.clusterDim.y;
    c[2] = attribute.val.clusterDim.z;
  }
  return static_cast<cudaError_t>(launch(function, g, b, c, config->dynamicSmemBytes, arguments));
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (!kernels().count(function)) return cudaErrorInvalidDeviceFunction;
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) return cudaSuccess;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > kMostShared)
    return cudaErrorInvalidValue;
  shared_limits()[function] = value;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = std::string(name) == "cuTensorMapEncodeTiled" && version >= 12000;
  *function = known ? reinterpret_cast<void*>(&encode) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMaxSharedMemoryPerBlockOptin) return cudaErrorInvalidValue;
  *value = kMostShared;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "the interpreter refused it"; }
const char* cudaGetErrorName(cudaError_t error) {
  static std::string text;
  text = std::to_string(static_cast<int>(error));
  return text.c_str();
}

}  // extern "C"
