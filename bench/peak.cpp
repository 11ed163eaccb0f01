// What the processor can do at most: loops that touch nothing but registers, one instruction each, and a copy.
//
//   peak list                               the kinds that this processor has, one a line
//   peak KIND THREADS SECONDS SAMPLES       one line per sample: operations (or bytes) per second of all threads
//
// Operations are multiplications and additions; the copy's bytes are those read and those written. `peak.py` compiles
// and runs this; nothing of the engine is in it, so that the engine's own code cannot lower its own ceiling.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#include <sys/auxv.h>
#endif

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

namespace {

using Clock = std::chrono::steady_clock;

// A kind of work: `repeat` times its unit, on thread-private `state`.
struct Kind {
  const char* name;
  double per_repeat;  // operations or bytes
  void (*run)(long repeat, void* state);
  bool (*present)();
};

volatile float sink;  // what a loop computed goes here, so that the compiler keeps the loop

#if defined(__x86_64__)

struct Leaf7 {
  unsigned eax0 = 0, ebx = 0, ecx = 0, edx = 0, eax1 = 0;
  Leaf7() {
    unsigned b = 0, c = 0, d = 0;
    if (__get_cpuid_count(7, 0, &eax0, &ebx, &ecx, &edx)) __get_cpuid_count(7, 1, &eax1, &b, &c, &d);
  }
};

bool has(unsigned word, int bit) { return (word >> bit) & 1; }
// These two ask for the operating system's support as well.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw"); }
bool has_bf16() { return has_avx512() && has(Leaf7().eax1, 5); }
bool has_vnni256() { return has_avx2() && has(Leaf7().eax1, 4); }
bool has_vnni512() { return has_avx512() && has(Leaf7().ecx, 11); }

// Linux gives a process its tile registers on request.
bool amx_granted() {
  constexpr long request_permission = 0x1023, tile_data = 18;
  return has(Leaf7().edx, 24) && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
bool has_amx_bf16() { return has(Leaf7().edx, 22) && amx_granted(); }
bool has_amx_int8() { return has(Leaf7().edx, 25) && amx_granted(); }

// Enough independent chains to cover latency times issue width, few enough to stay in registers.
constexpr int kChains256 = 12, kChains512 = 24;

__attribute__((target("avx2,fma"))) void fma_avx2(long repeat, void*) {
  __m256 sums[kChains256], scale = _mm256_set1_ps(0.999f), add = _mm256_set1_ps(0.37f);
  UNROLL for (int i = 0; i < kChains256; ++i) sums[i] = _mm256_set1_ps(static_cast<float>(i));
  for (long r = 0; r < repeat; ++r) {
    UNROLL for (int i = 0; i < kChains256; ++i) sums[i] = _mm256_fmadd_ps(sums[i], scale, add);
  }
  UNROLL for (int i = 1; i < kChains256; ++i) sums[0] = _mm256_add_ps(sums[0], sums[i]);
  sink = _mm256_cvtss_f32(sums[0]);
}

__attribute__((target("avx512f"))) void fma_avx512(long repeat, void*) {
  __m512 sums[kChains512], scale = _mm512_set1_ps(0.999f), add = _mm512_set1_ps(0.37f);
  UNROLL for (int i = 0; i < kChains512; ++i) sums[i] = _mm512_set1_ps(static_cast<float>(i));
  for (long r = 0; r < repeat; ++r) {
    UNROLL for (int i = 0; i < kChains512; ++i) sums[i] = _mm512_fmadd_ps(sums[i], scale, add);
  }
  UNROLL for (int i = 1; i < kChains512; ++i) sums[0] = _mm512_add_ps(sums[0], sums[i]);
  sink = _mm512_cvtss_f32(sums[0]);
}

__attribute__((target("avx512f,avx512bw,avx512bf16"))) void bf16_avx512(long repeat, void*) {
  __m512 sums[kChains512];
  const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f913e22), b = (__m512bh)_mm512_set1_epi32(0x3d15bf07);
  UNROLL for (int i = 0; i < kChains512; ++i) sums[i] = _mm512_set1_ps(static_cast<float>(i));
  for (long r = 0; r < repeat; ++r) {
    UNROLL for (int i = 0; i < kChains512; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], a, b);
  }
  UNROLL for (int i = 1; i < kChains512; ++i) sums[0] = _mm512_add_ps(sums[0], sums[i]);
  sink = _mm512_cvtss_f32(sums[0]);
}

// Assembly, since GCC 12 spills the sums around these intrinsics.
__attribute__((target("avx2"))) void int8_avx2(long repeat, void*) {
  __m256i sums[kChains256], a = _mm256_set1_epi32(0x5b17c3a9), b = _mm256_set1_epi32(0x13f94be5);
  UNROLL for (int i = 0; i < kChains256; ++i) sums[i] = _mm256_set1_epi32(i);
  for (long r = 0; r < repeat; ++r) {
    UNROLL for (int i = 0; i < kChains256; ++i) asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums[i]) : "x"(a), "x"(b));
  }
  UNROLL for (int i = 1; i < kChains256; ++i) sums[0] = _mm256_add_epi32(sums[0], sums[i]);
  sink = static_cast<float>(_mm256_extract_epi32(sums[0], 0));
}

__attribute__((target("avx512f"))) void int8_avx512(long repeat, void*) {
  __m512i sums[kChains512], a = _mm512_set1_epi32(0x5b17c3a9), b = _mm512_set1_epi32(0x13f94be5);
  UNROLL for (int i = 0; i < kChains512; ++i) sums[i] = _mm512_set1_epi32(i);
  for (long r = 0; r < repeat; ++r) {
    UNROLL for (int i = 0; i < kChains512; ++i) asm("vpdpbusd %2, %1, %0" : "+v"(sums[i]) : "v"(a), "v"(b));
  }
  UNROLL for (int i = 1; i < kChains512; ++i) sums[0] = _mm512_add_epi32(sums[0], sums[i]);
  std::int32_t lanes[16];
  _mm512_storeu_si512(lanes, sums[0]);
  sink = static_cast<float>(lanes[0]);
}

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes_per_row[16] = {};
  std::uint8_t rows[16] = {};
};

// Tiles 0..3 accumulate, 4 and 5 times 6 and 7: all 16 rows of 64 bytes, loaded once with changing, harmless bits.
__attribute__((target("amx-tile"))) void load_tiles() {
  TileConfig config;
  alignas(64) std::uint8_t bytes[1024];
  for (int i = 0; i < 8; ++i) config.bytes_per_row[i] = 64, config.rows[i] = 16;
  // As bf16: 0x3d.., values near 0.04; as int8 any values do.
  for (int i = 0; i < 1024; ++i) bytes[i] = i % 2 ? 0x3d : static_cast<std::uint8_t>(37 * i);
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, bytes, 64);
  _tile_loadd(5, bytes, 64);
  _tile_loadd(6, bytes, 64);
  _tile_loadd(7, bytes, 64);
}

__attribute__((target("amx-tile,amx-bf16"))) void bf16_amx(long repeat, void*) {
  load_tiles();
  for (long r = 0; r < repeat; ++r) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}

__attribute__((target("amx-tile,amx-int8"))) void int8_amx(long repeat, void*) {
  load_tiles();
  for (long r = 0; r < repeat; ++r) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
}
#elif defined(__aarch64__)

bool has_neon() { return true; }
bool has_neon_bf16() { return getauxval(AT_HWCAP2) & (1ul << 14); }  // HWCAP2_BF16

constexpr int kChainsNeon = 24;

void fma_neon(long repeat, void*) {
  float32x4_t sums[kChainsNeon], scale = vdupq_n_f32(0.999f), add = vdupq_n_f32(0.37f);
  UNROLL for (int i = 0; i < kChainsNeon; ++i) sums[i] = vdupq_n_f32(static_cast<float>(i));
  for (long r = 0; r < repeat; ++r) {
    UNROLL for (int i = 0; i < kChainsNeon; ++i) sums[i] = vfmaq_f32(sums[i], scale, add);
  }
  UNROLL for (int i = 1; i < kChainsNeon; ++i) sums[0] = vaddq_f32(sums[0], sums[i]);
  sink = vgetq_lane_f32(sums[0], 0);
}

// Assembly, so that this file needs no flag for the instruction.
void bf16_neon(long repeat, void*) {
  float32x4_t sums[kChainsNeon];
  const uint32x4_t a = vdupq_n_u32(0x3f913e22), b = vdupq_n_u32(0x3d15bf07);
  UNROLL for (int i = 0; i < kChainsNeon; ++i) sums[i] = vdupq_n_f32(static_cast<float>(i));
  for (long r = 0; r < repeat; ++r) {
    UNROLL for (int i = 0; i < kChainsNeon; ++i) {
      asm(".arch_extension bf16\n\tbfmmla %0.4s, %1.8h, %2.8h" : "+w"(sums[i]) : "w"(a), "w"(b));
    }
  }
  UNROLL for (int i = 1; i < kChainsNeon; ++i) sums[0] = vaddq_f32(sums[0], sums[i]);
  sink = vgetq_lane_f32(sums[0], 0);
}
#endif  // __aarch64__

constexpr std::size_t kCopied = std::size_t{256} << 20;  // all threads together; far above any L2, and most L3
constexpr std::size_t kUnit = std::size_t{1} << 20;

// A thread's share of what is copied: once through its memory per `units` repeats.
struct Copy {
  std::size_t units;
  std::unique_ptr<char[]> from, to;
};

void copy(long repeat, void* state) {
  const Copy& mine = *static_cast<Copy*>(state);
  for (long r = 0; r < repeat; ++r) {
    const std::size_t at = static_cast<std::size_t>(r) % mine.units * kUnit;
    std::memcpy(mine.to.get() + at, mine.from.get() + at, kUnit);
  }
  sink = mine.to[static_cast<std::size_t>(repeat) % kUnit];
}

const Kind kKinds[] = {
#if defined(__x86_64__)
    {"float32-avx2", 2.0 * 8 * kChains256, fma_avx2, has_avx2},
    {"float32-avx512", 2.0 * 16 * kChains512, fma_avx512, has_avx512},
    {"bfloat16-avx512_bf16", 2.0 * 32 * kChains512, bf16_avx512, has_bf16},
    {"bfloat16-amx", 4 * 2.0 * 16 * 16 * 32, bf16_amx, has_amx_bf16},
    {"int8-avx2", 2.0 * 32 * kChains256, int8_avx2, has_vnni256},
    {"int8-avx512", 2.0 * 64 * kChains512, int8_avx512, has_vnni512},
    {"int8-amx", 4 * 2.0 * 16 * 16 * 64, int8_amx, has_amx_int8},
#elif defined(__aarch64__)
    {"float32-neon", 2.0 * 4 * kChainsNeon, fma_neon, has_neon},
    {"bfloat16-neon_bf16", 2.0 * 16 * kChainsNeon, bf16_neon, has_neon_bf16},
#endif
    {"copy", 2.0 * kUnit, copy, [] { return true; }},
};

// All threads start together; the time is that of the last one. One set of threads makes all samples. They wait for the
// start awake, so that each has a core already. Who does not measure sleeps until all are done: looking every 50 us
// whether they are cost up to a fifth of the rate with one core for each.
void measure(const Kind& kind, int threads, double seconds, int samples) {
  std::atomic<int> ready{0}, round{0};
  std::atomic<long> repeat{1};
  std::mutex mutex;
  std::condition_variable all_finished;
  int finished = 0;
  const auto work = [&] {
    Copy mine{std::max<std::size_t>(1, kCopied / kUnit / threads), nullptr, nullptr};
    if (kind.run == copy) {
      mine.from.reset(new char[mine.units * kUnit]), mine.to.reset(new char[mine.units * kUnit]);
      std::memset(mine.from.get(), 1, mine.units * kUnit), std::memset(mine.to.get(), 2, mine.units * kUnit);
    }
    for (int next = 1;; ++next) {
      ready.fetch_add(1);
      while (round.load() < next) std::this_thread::yield();
      if (repeat.load() == 0) return;
      kind.run(repeat.load(), &mine);
      const std::lock_guard<std::mutex> lock(mutex);
      if (++finished == threads) all_finished.notify_one();
    }
  };
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) pool.emplace_back(work);
  const auto timed = [&](long count) {
    while (ready.load() < threads * (round.load() + 1)) std::this_thread::yield();
    std::unique_lock<std::mutex> lock(mutex);
    repeat = count;
    finished = 0;
    const auto start = Clock::now();
    round.fetch_add(1);
    if (count == 0) return 0.0;
    all_finished.wait(lock, [&] { return finished == threads; });
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  // The best of three: a single disturbed time would end the search with so few repeats that samples measure nothing
  // but the threads' start. (Seen on a busy machine: a rate 2,000 times too low.)
  const auto undisturbed = [&](long repeats) { return std::min({timed(repeats), timed(repeats), timed(repeats)}); };
  long count = 1;
  double taken = undisturbed(count);
  while (taken < seconds / 2) {
    count = taken < seconds / 64 ? count * 8 : static_cast<long>(static_cast<double>(count) * seconds / taken);
    taken = undisturbed(count);
  }
  for (int s = 0; s < samples; ++s) {
    std::printf("%.6g\n", kind.per_repeat * static_cast<double>(count) * threads / timed(count));
  }
  timed(0);
  for (auto& thread : pool) thread.join();
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 2 && !std::strcmp(arguments[1], "list")) {
    for (const Kind& kind : kKinds) {
      if (kind.present()) std::puts(kind.name);
    }
    return 0;
  }
  if (count != 5) return std::fputs("usage: peak list | peak KIND THREADS SECONDS SAMPLES\n", stderr), 2;
  for (const Kind& kind : kKinds) {
    if (std::strcmp(arguments[1], kind.name)) continue;
    if (!kind.present()) return std::fprintf(stderr, "this processor has no %s\n", kind.name), 1;
    measure(kind, std::max(1, std::atoi(arguments[2])), std::atof(arguments[3]), std::atoi(arguments[4]));
    return 0;
  }
  return std::fprintf(stderr, "unknown kind %s\n", arguments[1]), 2;
}
