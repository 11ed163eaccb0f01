// Checks the CPU kernels without PyTorch: every op on the instruction sets that this machine has.
//
//   kernel_check describe                 what dispatch.cpp found, as JSON
//   kernel_check run [SET]                the checks, on one set or on all that can run here; 1 if one failed
//   kernel_check faults SET               puts faults into the calls (faults.h); 1 if the checks let one pass
//   kernel_check mutant NUMBER SET SECTION  one section with riformer_mutant set (test_aarch64.py); 1 if it fails
#include "../../../csrc/cpu/dispatch.h"
#include "check_others.h"
#include "faults.h"

// Read only by sources into which a test has put mutants.
int riformer_mutant = 0;

namespace kernel_check {
namespace {

constexpr DType f32 = DType::f32, bf16 = DType::bf16, f16 = DType::f16;

// Around every edge: one position, less than a vector, tiles of 16 and 64 positions, ragged panels, more than one task,
// chunks of 128 and 256 hidden channels, chains of 64 products.
constexpr BlockCase kBlocks[] = {
    {8, 8, 1, 5, f32, false, true, 't', f32},
    {8, 8, 1, 5, f32, true, false, 'u', f32},
    {16, 64, 63, 3, f32, false, false, 'd', f32},
    {16, 64, 63, 3, f32, true, true, 't', f32},
    {24, 264, 49, 2, f32, false, true, 'u', f32},
    {24, 72, 340, 1, f32, false, false, 't', f32},
    {40, 136, 25, 3, f32, true, false, 'd', f32},
    {136, 256, 49, 1, f32, false, false, 'd', f32},
    {16, 64, 63, 3, f32, false, false, 'u', f32, 3e-3, 0},
    {16, 64, 63, 3, f32, true, false, 'u', f32, 3e-3, 0},
    {16, 64, 63, 3, f32, false, false, 'd', f32, 3e-3, 0},
    {16, 64, 63, 3, f32, false, false, 'u', f32, 1, 1000},
    {16, 32, 63, 2, f32, false, true, 't', bf16},
    {16, 32, 63, 2, f32, false, true, 't', f32, 1, 0, false},
    {16, 64, 63, 3, bf16, false, true, 't', bf16},
    {16, 64, 63, 3, bf16, true, false, 'd', bf16},
    {24, 264, 49, 2, bf16, false, false, 'u', bf16},
    {40, 528, 25, 3, bf16, false, false, 't', f32},
    {64, 256, 196, 1, bf16, false, true, 'd', bf16},
    {16, 64, 63, 3, f16, false, false, 't', f16},
    {24, 72, 49, 2, f16, true, true, 'd', f16},
};
constexpr BlockCase kPromises[] = {
    {16, 64, 49, 3, f32, false, true, 't', f32},     {16, 72, 340, 3, f32, false, true, 'd', f32},
    {24, 264, 33, 3, f32, true, true, 't', f32},     {16, 64, 49, 3, bf16, false, true, 't', bf16},
    {24, 528, 340, 2, bf16, false, false, 'd', f32}, {16, 64, 33, 3, f16, false, true, 'u', f16},
};
constexpr EmbedCase kEmbeds[] = {
    {{2, 3, 33, 41, 16, 7, 7, 4, 2}, f32, f32, false, true},
    {{2, 8, 17, 20, 24, 3, 3, 2, 1}, f32, f32, false, true},
    {{2, 20, 9, 7, 12, 3, 3, 2, 1}, f32, f32, true, false},
    {{3, 15, 5, 4, 7, 3, 3, 2, 1}, f32, f32, false, true},
    {{2, 2, 11, 6, 9, 1, 1, 5, 0}, f32, f32, false, true},
    {{3, 3, 4, 9, 1, 2, 5, 3, 3}, f32, f32, true, true},
    {{2, 3, 33, 41, 16, 7, 7, 4, 2}, f32, bf16, false, true},
    {{2, 8, 17, 20, 24, 3, 3, 2, 1}, bf16, bf16, true, true},
    {{2, 15, 9, 7, 12, 3, 3, 2, 1}, bf16, bf16, false, true},
    {{2, 24, 14, 14, 40, 3, 3, 2, 1}, bf16, bf16, false, true},
    {{3, 3, 4, 9, 1, 2, 5, 3, 3}, bf16, bf16, false, false},
    {{2, 3, 33, 41, 16, 7, 7, 4, 2}, f16, f16, false, true},
};

struct Section {
  const char* name;
  void (*check)(const Kernels& kernels, const char* set, Report& report);
};

constexpr Section kSections[] = {
    {"block",
     [](const Kernels& kernels, const char*, Report& report) {
       for (const BlockCase& c : kBlocks) check_block(kernels, c, report);
     }},
    {"the promises of block",
     [](const Kernels& kernels, const char*, Report& report) {
       for (const BlockCase& c : kPromises) check_block_promises(kernels, c, report);
     }},
    {"embed",
     [](const Kernels& kernels, const char*, Report& report) {
       for (const EmbedCase& c : kEmbeds) check_embed(kernels, c, report);
     }},
    {"norm and moments",
     [](const Kernels& kernels, const char*, Report& report) {
       for (const bool per_position : {false, true}) {
         for (const DType dtype : {f32, bf16, f16}) {
           check_norm(kernels, {3, 20, 63}, dtype, dtype, per_position, 1, 0.5, report);
           check_norm(kernels, {1, 24, 340}, dtype, f32, per_position, 1, 0.5, report);
         }
         check_norm(kernels, {3, 20, 63}, f32, bf16, per_position, 3e-3, 0, report);
         check_norm(kernels, {3, 20, 63}, f32, f32, per_position, 3e-3, 0, report);
         check_norm(kernels, {3, 20, 63}, f32, f32, per_position, 1, 1000, report);
       }
     }},
    {"head",
     [](const Kernels& kernels, const char*, Report& report) {
       for (const bool per_position : {false, true})
         for (const DType dtype : {f32, bf16, f16}) check_head(kernels, {13, 40, 25}, 41, dtype, per_position, report);
       check_head(kernels, {12, 136, 1}, 40, f32, false, report);
     }},
    {"conversions",
     [](const Kernels& kernels, const char* set, Report& report) {
       // The x86 conversion to bfloat16 is documented to flush them.
       const bool flushes = !std::strcmp(set, "avx512_bf16") || !std::strncmp(set, "amx", 3);
       for (const DType from : {f32, bf16, f16})
         for (const DType to : {f32, bf16, f16}) check_conversions(kernels, from, to, flushes, report);
     }},
};

int run(const char* name) {
  int failures = 0, sets = 0;
  const std::string wanted = name;
#define SET(architecture, space, set, ...)                          \
  RIFORMER_ON_##architecture(if (wanted.empty() || wanted == set) { \
    const std::string reason = riformer::cpu::select(set);          \
    if (reason.empty()) {                                           \
      Report report;                                                \
      for (const Section& section : kSections) {                    \
        section.check(*riformer::cpu::kernels(), set, report);      \
        report.summary(set, section.name);                          \
      }                                                             \
      failures += report.failures;                                  \
      ++sets;                                                       \
    } else if (!wanted.empty()) {                                   \
      std::printf("%s\n", reason.c_str());                          \
      return 2;                                                     \
    }                                                               \
  })
#include "../../../csrc/cpu/instruction_sets.def"
  if (sets == 0) {
    std::printf("%s\n", riformer::cpu::select(name).c_str());
    return 2;
  }
  return failures > 0;
}

// Whether these kernels fail in a section; "" is any.
bool fails(const Kernels& kernels, const char* set, const std::string& wanted) {
  Report report;
  report.stops = true;
  try {
    for (const Section& section : kSections)
      if (wanted.empty() || wanted == section.name) section.check(kernels, set, report);
  } catch (const Failed&) {
    return true;
  }
  return false;
}

// Prints why the set cannot be used.
bool selected(const char* set) {
  const std::string reason = riformer::cpu::select(set);
  if (!reason.empty()) std::printf("%s\n", reason.c_str());
  return reason.empty();
}

int faults(const char* set) {
  if (!selected(set)) return 2;
  int survived = 0;
  for (int number = 0; number < kFaultCount; ++number) {
    const bool caught = fails(with_fault(*riformer::cpu::kernels(), number), set, "");
    std::printf("%s: %s\n", caught ? "caught" : "SURVIVED", kFaults[number]);
    survived += !caught;
  }
  return survived > 0;
}

int mutant(int number, const char* set, const std::string& section) {
  if (!selected(set)) return 2;
  const auto is_it = [&](const Section& one) { return section == one.name; };
  if (std::none_of(std::begin(kSections), std::end(kSections), is_it)) {
    std::printf("there is no section '%s'\n", section.c_str());
    return 2;
  }
  riformer_mutant = number;
  return fails(*riformer::cpu::kernels(), set, section);
}

}  // namespace
}  // namespace kernel_check

int main(int count, char** arguments) {
  std::signal(SIGSEGV, kernel_check::report_signal);
  const std::string what = count > 1 ? arguments[1] : "";
  if (what == "describe" && count == 2) return std::printf("%s\n", riformer::cpu::describe().c_str()) < 0;
  if (what == "run" && count <= 3) return kernel_check::run(count == 3 ? arguments[2] : "");
  if (what == "faults" && count == 3) return kernel_check::faults(arguments[2]);
  if (what == "mutant" && count == 5) return kernel_check::mutant(std::atoi(arguments[2]), arguments[3], arguments[4]);
  return std::fputs("usage: kernel_check describe | run [SET] | faults SET | mutant NUMBER SET SECTION\n", stderr), 2;
}
