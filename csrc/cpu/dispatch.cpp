#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace riformer::cpu {
namespace {

// feature::avx2 and so on: one bit for each FEATURE of instruction_sets.def. feature::needs_avx2 and so on: the
// features of each SET.
namespace feature {
enum Index : unsigned {
#define FEATURE(architecture, id, name, flag) RIFORMER_ON_##architecture(index_of_##id, )
#include "instruction_sets.def"
};
constexpr unsigned none = 0;
#define FEATURE(architecture, id, name, flag) RIFORMER_ON_##architecture(constexpr unsigned id = 1u << index_of_##id;)
#include "instruction_sets.def"
#define SET(architecture, space, name, choice, source, flags, features) \
  RIFORMER_ON_##architecture(constexpr unsigned needs_##space = features;)
#include "instruction_sets.def"
}  // namespace feature

struct Feature {
  unsigned bit;
  const char* name;
};
constexpr std::initializer_list<Feature> kFeatures = {
#define FEATURE(architecture, id, name, flag) RIFORMER_ON_##architecture({feature::id, name}, )
#include "instruction_sets.def"
};

enum Choice { automatic, on_request };

struct InstructionSet {
  const char* name;
  Choice choice;
  unsigned needs;
  const Kernels* kernels;
};

// Best first.
constexpr InstructionSet kInstructionSets[] = {
#define SET(architecture, space, name, choice, source, flags, features) \
  RIFORMER_ON_##architecture({name, choice, feature::needs_##space, &riformer::space::kKernels}, )
#include "instruction_sets.def"
};

#if defined(__x86_64__)

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

// The features of this machine. A processor's registers can be used only if the operating system saves their state.
unsigned detect() {
  unsigned a, b, c, d, found = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  const bool has_xgetbv = c & (1u << 27);
  if (!has_xgetbv) return 0;
  const unsigned long long state = enabled_state();
  const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6, tiles = (state & 0x60000) == 0x60000;
  if (ymm && (c & (1u << 12))) found |= feature::fma;
  if (ymm && (c & (1u << 29))) found |= feature::f16c;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  const unsigned leaves = a;
  if (ymm && (b & (1u << 5))) found |= feature::avx2;
  if (zmm && (b & (1u << 16))) found |= feature::avx512f;
  if (zmm && (b & (1u << 17))) found |= feature::avx512dq;
  if (zmm && (b & (1u << 30))) found |= feature::avx512bw;
  if (zmm && (b & (1u << 31))) found |= feature::avx512vl;
  if (tiles && (d & (1u << 24))) found |= feature::amx_tile;
  if (tiles && (d & (1u << 22))) found |= feature::amx_bf16;
  if (zmm && (c & (1u << 11))) found |= feature::avx512_vnni;
  if (leaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
    if (ymm && (a & (1u << 4))) found |= feature::avx_vnni;
    if (zmm && (a & (1u << 5))) found |= feature::avx512_bf16;
  }
  if ((found & feature::amx_tile) && request_tiles()) found |= feature::amx_permission;
  return found;
}

#elif defined(__aarch64__) && defined(__linux__)

// The features of this machine, as Linux tells every process. The numbers are those of its <asm/hwcap.h>; headers older
// than a processor lack the names.
unsigned detect() {
  constexpr unsigned long kAsimd = 1ul << 1, kBf16 = 1ul << 14;  // in AT_HWCAP, in AT_HWCAP2
  unsigned found = 0;
  if (getauxval(AT_HWCAP) & kAsimd) found |= feature::asimd;
  if (getauxval(AT_HWCAP2) & kBf16) found |= feature::bf16;
  return found;
}

#else

// Of any other machine nothing is known: it runs plain C++.
unsigned detect() { return feature::none; }

#endif

std::string missing(unsigned needs, unsigned have) {
  std::string text;
  for (const Feature& feature : kFeatures)
    if (feature.bit & needs & ~have) text += (text.empty() ? "" : ", ") + std::string(feature.name);
  return text;
}

// Names of the sets that can run with these features.
std::string usable(unsigned features) {
  std::string text;
  for (const InstructionSet& set : kInstructionSets)
    if (!(set.needs & ~features)) text += (text.empty() ? "" : ", ") + std::string(set.name);
  return text;
}

struct State {
  unsigned features;
  std::atomic<const InstructionSet*> chosen{nullptr};
  std::string error;

  State() : features(detect()) {
    const char* forced = std::getenv("RIFORMER_CPU_ISA");
    error = choose(forced ? forced : "");
  }

  std::string choose(const char* name) {
    for (const InstructionSet& set : kInstructionSets) {
      if (*name ? std::strcmp(name, set.name) != 0 : set.choice != automatic || (set.needs & ~features)) continue;
      const std::string lacks = missing(set.needs, features);
      if (!lacks.empty())
        return "this machine lacks " + lacks + ", which instruction set '" + name + "' needs; expected one of " +
               usable(features);
      chosen.store(&set);
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

const Kernels* kernels() {
  const InstructionSet* chosen = state().chosen.load(std::memory_order_relaxed);
  return chosen ? chosen->kernels : nullptr;
}

std::string select(const char* name) {
  const std::string error = state().choose(name);
  if (error.empty()) state().error.clear();
  return error;
}

std::string describe() {
  const State& now = state();
  const InstructionSet* chosen = now.chosen.load();
  std::string supported, features, used;
  for (const InstructionSet& set : kInstructionSets)
    if (!(set.needs & ~now.features)) supported += (supported.empty() ? "" : ", ") + quoted(set.name);
  std::string compiled;
  for (const InstructionSet& set : kInstructionSets) compiled += (compiled.empty() ? "" : ", ") + quoted(set.name);
  for (const Feature& feature : kFeatures)
    features +=
        (features.empty() ? "" : ", ") + quoted(feature.name) + ": " + (now.features & feature.bit ? "true" : "false");
  for (const Feature& feature : kFeatures)
    if (chosen && (chosen->needs & feature.bit)) used += (used.empty() ? "" : ", ") + quoted(feature.name);
  return "{\"chosen\": " + (chosen ? quoted(chosen->name) : "null") + ", \"used\": [" + used + "], \"supported\": [" +
         supported + "], \"compiled\": [" + compiled + "], \"features\": {" + features +
         "}, \"error\": " + (now.error.empty() ? "null" : quoted(now.error)) + "}";
}

}  // namespace riformer::cpu
