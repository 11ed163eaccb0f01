#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#ifdef RIFORMER_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace riformer::cpu {
namespace {

// One bit per thing that a translation unit's compile flags let the compiler use.
enum Feature : unsigned {
  kAvx2 = 1u << 0,
  kFma = 1u << 1,
  kF16c = 1u << 2,
  kAvx512f = 1u << 3,
  kAvx512bw = 1u << 4,
  kAvx512dq = 1u << 5,
  kAvx512vl = 1u << 6,
  kAvx512Bf16 = 1u << 7,
  kAmxTile = 1u << 8,
  kAmxBf16 = 1u << 9,
  kAmxPermission = 1u << 10,
};

struct Named {
  unsigned bit;
  const char* name;
};
constexpr Named kFeatures[] = {
    {kAvx2, "avx2"},
    {kFma, "fma"},
    {kF16c, "f16c"},
    {kAvx512f, "avx512f"},
    {kAvx512bw, "avx512bw"},
    {kAvx512dq, "avx512dq"},
    {kAvx512vl, "avx512vl"},
    {kAvx512Bf16, "avx512_bf16"},
    {kAmxTile, "amx_tile"},
    {kAmxBf16, "amx_bf16"},
    {kAmxPermission, "amx permission of the operating system"},
};

constexpr unsigned kNeedAvx2 = kAvx2 | kFma | kF16c;
constexpr unsigned kNeedAvx512 = kNeedAvx2 | kAvx512f | kAvx512bw | kAvx512dq | kAvx512vl | kAvx512Bf16;
constexpr unsigned kNeedAmx = kNeedAvx512 | kAmxTile | kAmxBf16 | kAmxPermission;

#ifdef RIFORMER_X86

unsigned long long enabled_state() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<unsigned long long>(high) << 32) | low;
}

// Linux hands out the tile registers' state on request only (arch_prctl ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
bool request_tiles() {
#ifdef SYS_arch_prctl
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

unsigned detect() {
  unsigned a, b, c, d, found = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  const bool has_xgetbv = c & (1u << 27);
  if (!has_xgetbv) return 0;
  const unsigned long long state = enabled_state();
  const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6, tiles = (state & 0x60000) == 0x60000;
  if (ymm && (c & (1u << 12))) found |= kFma;
  if (ymm && (c & (1u << 29))) found |= kF16c;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  const unsigned leaves = a;
  if (ymm && (b & (1u << 5))) found |= kAvx2;
  if (zmm && (b & (1u << 16))) found |= kAvx512f;
  if (zmm && (b & (1u << 17))) found |= kAvx512dq;
  if (zmm && (b & (1u << 30))) found |= kAvx512bw;
  if (zmm && (b & (1u << 31))) found |= kAvx512vl;
  if (tiles && (d & (1u << 24))) found |= kAmxTile;
  if (tiles && (d & (1u << 22))) found |= kAmxBf16;
  if (leaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && zmm && (a & (1u << 5))) found |= kAvx512Bf16;
  if ((found & kAmxTile) && request_tiles()) found |= kAmxPermission;
  return found;
}

#else

unsigned detect() { return 0; }

#endif

struct Entry {
  const Kernels* kernels;
  unsigned needs;
  bool automatic;
};

// Best first.
constexpr Entry kEntries[] = {
#ifdef RIFORMER_X86
    {&kAmxKernels, kNeedAmx, true},   {&kAvx512Kernels, kNeedAvx512, true},
    {&kAvx2Kernels, kNeedAvx2, true}, {&kAmxEmulatedKernels, kNeedAvx512, false},
#endif
    {&kScalarKernels, 0, true},
};

std::string missing(unsigned needs, unsigned have) {
  std::string text;
  for (const Named& feature : kFeatures)
    if (feature.bit & needs & ~have) text += (text.empty() ? "" : ", ") + std::string(feature.name);
  return text;
}

// Names of the sets that can run with these features.
std::string usable(unsigned features) {
  std::string text;
  for (const Entry& entry : kEntries)
    if (!(entry.needs & ~features)) text += (text.empty() ? "" : ", ") + std::string(entry.kernels->name);
  return text;
}

struct State {
  unsigned features;
  std::atomic<const Kernels*> chosen{nullptr};
  std::string error;

  State() : features(detect()) {
    const char* forced = std::getenv("RIFORMER_CPU_ISA");
    error = choose(forced ? forced : "");
  }

  std::string choose(const char* name) {
    for (const Entry& entry : kEntries) {
      if (*name ? std::strcmp(name, entry.kernels->name) != 0 : !entry.automatic || (entry.needs & ~features)) continue;
      const std::string lacks = missing(entry.needs, features);
      if (!lacks.empty())
        return "this machine lacks " + lacks + ", which instruction set '" + name + "' needs; expected one of " +
               usable(features);
      chosen.store(entry.kernels);
      return "";
    }
    return "unknown instruction set '" + std::string(name) + "': expected one of " + usable(features);
  }
};

State& state() {
  static State instance;
  return instance;
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) >= 0x20) out += c;
  }
  return out + "\"";
}

}  // namespace

const Kernels* kernels() { return state().chosen.load(std::memory_order_relaxed); }

std::string select(const char* name) {
  const std::string error = state().choose(name);
  if (error.empty()) state().error.clear();
  return error;
}

std::string describe() {
  const State& now = state();
  const Kernels* chosen = now.chosen.load();
  std::string supported, features;
  for (const Entry& entry : kEntries)
    if (!(entry.needs & ~now.features)) supported += (supported.empty() ? "" : ", ") + quoted(entry.kernels->name);
  std::string compiled;
  for (const Entry& entry : kEntries) compiled += (compiled.empty() ? "" : ", ") + quoted(entry.kernels->name);
  for (const Named& feature : kFeatures)
    features +=
        (features.empty() ? "" : ", ") + quoted(feature.name) + ": " + (now.features & feature.bit ? "true" : "false");
  return "{\"chosen\": " + (chosen ? quoted(chosen->name) : "null") + ", \"supported\": [" + supported +
         "], \"compiled\": [" + compiled + "], \"features\": {" + features +
         "}, \"error\": " + (now.error.empty() ? "null" : quoted(now.error)) + "}";
}

}  // namespace riformer::cpu
