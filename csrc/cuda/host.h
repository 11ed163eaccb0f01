// What a call of an op needs of the machine around its kernels: the current device, its stream, and memory. There is
// one form for a GPU and one for the emulator. On the emulator every result and workspace lies between guards and
// starts as NaN, so that the tests notice a kernel that writes beside them or reads what nobody wrote.
#pragma once

#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../common/arguments.h"
#include "kernels.h"

#if defined(RIFORMER_EMULATED)
#include "../emulator/emulator.h"
#define RIFORMER_ARCHITECTURES "80, 90a"
#else
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "check.h"
#endif

namespace riformer::cuda {

constexpr int64_t kWorkspaceAlignment = 256;

inline void* aligned(void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  return reinterpret_cast<void*>((address + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment);
}

#if !defined(RIFORMER_EMULATED)

inline bool served(const Tensor& tensor) { return tensor.is_cuda(); }

// Whether this library has code for a GPU. Machine code runs on its own major version from its minor version on;
// machine code with an "a", such as 90a, on its own version alone. The newest architecture without an "a" is there as
// PTX too, which runs on everything from there on.
inline bool compiled_for(int architecture) {
  int newest = 0;
  std::istringstream list(RIFORMER_ARCHITECTURES);
  for (std::string word; std::getline(list, word, ',');) {
    const int version = std::stoi(word);
    const bool plain = word.back() != 'a';
    if (plain ? version / 10 == architecture / 10 && version <= architecture : version == architecture) return true;
    if (plain && version > newest) newest = version;
  }
  return newest && architecture >= newest;
}

// Asked once for each GPU, as each question takes the driver microseconds.
inline Device device_of(int index) {
  static std::mutex mutex;
  static std::vector<Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (static_cast<int>(known.size()) <= index) known.resize(static_cast<size_t>(index) + 1);
  Device& device = known[static_cast<size_t>(index)];
  if (device.processors == 0) {
    int major = 0, minor = 0, processors = 0;
    const auto capability = [] { return "asking a GPU for its compute capability"; };
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), capability);
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), capability);
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index),
          [] { return "asking a GPU for its multiprocessors"; });
    device = {10 * major + minor, processors, nullptr};
  }
  return device;
}

// One call of an op. It makes the tokens' device current for its own lifetime, and keeps the workspaces until the
// kernels are launched. After that the allocator may hand the memory out again, as it does so in the order of the
// stream.
class Call {
 public:
  explicit Call(const Tensor& x) : guard_(x.get_device_index()), device_(device_of(x.get_device_index())) {
    // The guard sets PyTorch's current device. This library has a CUDA runtime of its own, and cuTensorMapEncodeTiled
    // fails on a thread that has no current context yet.
    check(cudaSetDevice(x.get_device_index()), [] { return "making a GPU current"; });
    if (!compiled_for(device_.architecture))
      fail("riformer: the CUDA kernels are compiled for ", RIFORMER_ARCHITECTURES, " and cuda:", x.get_device_index(),
           " has compute capability ", device_.architecture / 10, ".", device_.architecture % 10,
           "; install the package with RIFORMER_CUDA_ARCHITECTURES=", device_.architecture, ", or use another backend");
    if (aoti_torch_get_current_cuda_stream(x.get_device_index(), &device_.stream))
      fail("riformer: PyTorch gives no current stream of cuda:", x.get_device_index());
  }
  const Device& device() const { return device_; }
  void* result(const Tensor& out) { return out.mutable_data_ptr(); }
  void* workspace(int64_t bytes, const Tensor& x) {
    if (bytes == 0) return nullptr;
    held_.push_back(torch::stable::empty({bytes + kWorkspaceAlignment}, ScalarType::Byte, std::nullopt, x.device()));
    return aligned(held_.back().mutable_data_ptr());
  }
  void finish() {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Device device_;
  std::vector<Tensor> held_;
};

#else

inline bool served(const Tensor& tensor) { return tensor.is_cpu(); }

inline Device& emulated_device() {
  static Device device{90, 4, nullptr};
  return device;
}

// Bytes of shared memory of a thread block (CUDA programming guide, technical specifications per compute capability).
inline int64_t shared_limit(int architecture) {
  switch (architecture) {
    case 80:
    case 87: return 163 * 1024;
    case 86:
    case 89:
    case 120: return 99 * 1024;
    default: return 227 * 1024;
  }
}

class Call {
 public:
  explicit Call(const Tensor&) : device_(emulated_device()) {
    emulator::set_shared_limit(shared_limit(device_.architecture));
  }
  const Device& device() const { return device_; }
  // Where the kernels write `out`; `finish` copies it there.
  void* result(const Tensor& out) {
    return guarded(out.numel() * static_cast<int64_t>(out.element_size()), out.mutable_data_ptr());
  }
  void* workspace(int64_t bytes, const Tensor&) { return bytes ? guarded(bytes, nullptr) : nullptr; }
  void finish() {
    for (const Region& region : regions_) {
      for (int64_t i = 0; i < kWorkspaceAlignment; ++i)
        if (region.data[-1 - i] != 0xff || region.data[region.bytes + i] != 0xff)
          fail("riformer: emulated kernels wrote ", i, " bytes outside ", region.target ? "a result" : "the workspace",
               " of ", region.bytes, " bytes");
      if (region.target) std::memcpy(region.target, region.data, static_cast<size_t>(region.bytes));
    }
  }

 private:
  struct Region {
    unsigned char* data;
    int64_t bytes;
    void* target;
  };
  void* guarded(int64_t bytes, void* target) {
    const auto size = static_cast<size_t>(bytes + 3 * kWorkspaceAlignment);
    memory_.push_back(std::make_unique<unsigned char[]>(size));
    std::memset(memory_.back().get(), 0xff, size);
    auto* data = static_cast<unsigned char*>(aligned(memory_.back().get() + kWorkspaceAlignment));
    regions_.push_back({data, bytes, target});
    return data;
  }

  Device device_;
  std::vector<std::unique_ptr<unsigned char[]> > memory_;
  std::vector<Region> regions_;
};

#endif

}  // namespace riformer::cuda
