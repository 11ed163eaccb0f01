// The launchers of csrc/cuda behind a C interface for ctypes. Each takes its arguments as 64-bit words, in the order of
// the struct's members (kernels.h), and returns an error text, or null. An address is a word, a Parameter two, a float
// the bits of a double. The workspace is asked of a hook, in the size that the launcher wants.
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "block_choice.h"
#include "kernels.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace riformer;
using namespace riformer::cuda;

using WorkspaceHook = uint64_t (*)(int64_t bytes);
WorkspaceHook new_workspace = nullptr;

class Words {
 public:
  explicit Words(const int64_t* words) : at_(words) {}

  operator int64_t() { return *at_++; }
  operator int() { return static_cast<int>(*at_++); }
  operator bool() { return *at_++ != 0; }
  operator DType() { return static_cast<DType>(*at_++); }
  operator void*() { return reinterpret_cast<void*>(*at_++); }
  operator const void*() { return reinterpret_cast<const void*>(*at_++); }
  operator float*() { return reinterpret_cast<float*>(*at_++); }
  operator const float*() { return reinterpret_cast<const float*>(*at_++); }
  operator float() {
    double value;
    std::memcpy(&value, at_++, sizeof value);
    return static_cast<float>(value);
  }
  operator Parameter() {
    const void* data = *this;
    return {data, *this};
  }
  operator Device() {
    const int architecture = *this;
    return {architecture, *this, nullptr};
  }

 private:
  const int64_t* at_;
};

// The values of a braced list are evaluated from left to right.
BlockArgs block_args(const int64_t* words) {
  Words w(words);
  return {w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, nullptr};
}

void* workspace(int64_t bytes) { return bytes ? reinterpret_cast<void*>(new_workspace(bytes)) : nullptr; }

template <class Act>
const char* guarded(const Act& act) {
  static std::string text;
  try {
    act();
    return nullptr;
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
}

}  // namespace

EXPORT void ptx_workspace_hook(WorkspaceHook hook) { new_workspace = hook; }

EXPORT const char* ptx_block(const int64_t* words) {
  return guarded([&] {
    BlockArgs args = block_args(words);
    args.workspace = workspace(block_workspace(args));
    block(args);
  });
}
EXPORT const char* ptx_block_choice(const int64_t* words) {
  static std::string text;
  if (const char* error = guarded([&] { text = block_choice(block_args(words)); })) return error;
  return text.c_str();
}
EXPORT const char* ptx_embed(const int64_t* words) {
  return guarded([&] {
    Words w(words);
    EmbedArgs args{w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, nullptr};
    args.workspace = workspace(embed_workspace(args));
    embed(args);
  });
}
EXPORT const char* ptx_moments(const int64_t* words) {
  return guarded([&] {
    Words w(words);
    MomentsArgs args{w, w, w, w, w, w, w, nullptr};
    args.workspace = workspace(moments_workspace(args));
    moments(args);
  });
}
EXPORT const char* ptx_norm(const int64_t* words) {
  return guarded([&] {
    Words w(words);
    norm(NormArgs{w, w, w, w, w, w, w, w, w, w, w, w, w});
  });
}
EXPORT const char* ptx_head(const int64_t* words) {
  return guarded([&] {
    Words w(words);
    HeadArgs args{w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, nullptr};
    args.workspace = workspace(head_workspace(args));
    head(args);
  });
}
EXPORT const char* ptx_convert(const int64_t* words) {
  return guarded([&] {
    Words w(words);
    const Device device = w;
    const void* from = w;
    const DType from_dtype = w;
    void* to = w;
    const DType to_dtype = w;
    convert(device, from, from_dtype, to, to_dtype, w);
  });
}
