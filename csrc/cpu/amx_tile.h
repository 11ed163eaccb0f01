// AMX's eight tile registers: the instructions or, with RIFORMER_AMX_EMULATED, an emulation in memory.
//
// With the emulation, the indexing, padding and layout of the AMX kernels are tested on every machine that has AVX-512.
// It follows the definition of the instructions and is slow.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace riformer::RIFORMER_ISA {

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;

#ifdef RIFORMER_AMX_EMULATED

struct TileRegisters {
  alignas(64) uint8_t tile[8][kTileRows][kTileBytes];
};
inline TileRegisters& registers() {
  static thread_local TileRegisters state;
  return state;
}
inline void TILE_ZERO(int tile) { std::memset(registers().tile[tile], 0, sizeof(registers().tile[tile])); }
inline void TILE_LOAD(int tile, const void* from, int64_t stride_bytes) {
  for (int row = 0; row < kTileRows; ++row)
    std::memcpy(registers().tile[tile][row], static_cast<const char*>(from) + row * stride_bytes, kTileBytes);
}
inline void TILE_STORE(int tile, void* to, int64_t stride_bytes) {
  for (int row = 0; row < kTileRows; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride_bytes, registers().tile[tile][row], kTileBytes);
}
// c[m][n] += sum over k of a[m][2k] b[k][2n] + a[m][2k+1] b[k][2n+1], a and b of bfloat16
inline void TILE_MULTIPLY(int tile_c, int tile_a, int tile_b) {
  for (int m = 0; m < kTileRows; ++m) {
    Vec c = Vec::load(reinterpret_cast<const float*>(registers().tile[tile_c][m]));
    for (int k = 0; k < kTileBytes / 4; ++k) {
      uint32_t a;
      std::memcpy(&a, registers().tile[tile_a][m] + 4 * k, 4);
      const __m512i b = _mm512_load_si512(registers().tile[tile_b][k]);
      const __m512 a_even = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(a << 16)));
      const __m512 a_odd = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(a & 0xffff0000u)));
      const __m512 b_even = _mm512_castsi512_ps(_mm512_slli_epi32(b, 16));
      const __m512 b_odd = _mm512_castsi512_ps(_mm512_and_si512(b, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
      c = fma(Vec{a_even}, Vec{b_even}, c);
      c = fma(Vec{a_odd}, Vec{b_odd}, c);
    }
    c.store(reinterpret_cast<float*>(registers().tile[tile_c][m]));
  }
}
inline void tiles_configure() {}
inline void tiles_release() {}

#else

// Macros, because GCC pastes the tile's number into the text of the instruction.
#define TILE_ZERO(tile) _tile_zero(tile)
#define TILE_LOAD(tile, from, stride_bytes) _tile_loadd(tile, from, stride_bytes)
#define TILE_STORE(tile, to, stride_bytes) _tile_stored(tile, to, stride_bytes)
#define TILE_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)
// Palette 1, every tile 16 rows of 64 bytes.
inline void tiles_configure() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {kTileBytes, kTileBytes, kTileBytes, kTileBytes,
                          kTileBytes, kTileBytes, kTileBytes, kTileBytes};
    uint8_t rows[16] = {kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows};
  } config;
  _tile_loadconfig(&config);
}
inline void tiles_release() { _tile_release(); }

#endif

}  // namespace riformer::RIFORMER_ISA
