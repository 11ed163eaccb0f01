// The whole block in one kernel for sm_80, 16-bit tokens: norm, expand, GELU, project, layer scale, residual and
// moments, with mma.m16n8k16.
//
// A thread block takes 128 rows, which are two slots, and goes through the hidden channels, `kHidden` at a time. Each
// warp has its own rows (32 or 16) and all columns. z stays in registers as an operand of the first product. GELU turns
// the first product's sums into an operand of the second product, each lane for itself. The second product's sums
// [rows, C] stay in registers until the end. Only the weights move: `kHidden` hidden channels of both matrices come at
// a time, asynchronously, through a ring of `kStages` stages.
//
// Shared memory: the places of the slots; x [128, C], swizzled, in whose place the results are written before they are
// stored; the stages. A stage is rows of fc1 [kHidden, C], columns of fc2 [C, kHidden], both swizzled, and kHidden
// biases.
//
// Cost per row: 8 C^2 multiply-adds (hidden = 4 C) and 4 C GELUs of 14 instructions. A multiprocessor of an A100 does
// 1024 multiply-adds or 64 of these instructions in a cycle, so GELU takes longer up to C = 112. Every thread block
// reads all weights from L2: 16 bytes a cycle at the full matrix rate. With one slot to a thread block it would be 32,
// near the limit.
//
// C = 96 and 128 have 32 rows to a warp (255 registers, 8 warps to a multiprocessor), which halves what ldmatrix reads
// of the weights. C = 64 gains more from 16 warps of 16 rows. The sums of 32 rows of C = 192 do not fit into registers,
// and those of C = 320 and 384 leave none for z with 16 rows either: these are left to the pair of kernels.
#pragma once

#include <sstream>
#include <stdexcept>

#include "fragments_sm80.h"
#include "launch.h"
#include "slot_epilogue.h"

namespace riformer::cuda::sm80 {

// RowTiles: how many times 16 rows a warp has. Hidden: hidden channels of a stage. Step: hidden channels of which the
// first product is complete before GELU. PerMultiprocessor: thread blocks that have to fit on one at a time.
template <int Channels, int RowTiles, int Hidden, int Step, int Stages, int PerMultiprocessor>
struct FusedShape {
  static constexpr int kChannels = Channels, kRowTiles = RowTiles, kHidden = Hidden, kStep = Step, kStages = Stages;
  static constexpr int kPerMultiprocessor = PerMultiprocessor;
  static constexpr int kSlots = 2, kRows = kSlots * kSlotRows;
  static constexpr int kWarps = kRows / (16 * RowTiles), kThreads = kWarps * kWarp;
  static constexpr int kPieces = Channels / 8, kHiddenPieces = Hidden / 8;
  static constexpr int kTokenBytes = kRows * Channels * 2, kMatrixBytes = Hidden * Channels * 2;
  static constexpr int kStageBytes = 2 * kMatrixBytes + Hidden * 4;
  static constexpr int kSharedBytes = kPlaceBytes + kTokenBytes + Stages * kStageBytes;
  static_assert(kSlots * sizeof(SlotPlace) <= kPlaceBytes, "the places do not fit");
  static_assert(Channels % 16 == 0 && Hidden % Step == 0 && Step % 16 == 0 && Stages >= 2, "k goes in steps of 16");
  static_assert(kSharedBytes <= 99 * 1024, "what a thread block may use on sm_86 and sm_89");
};

template <int Channels>
struct FusedFor;
template <>
struct FusedFor<64> : FusedShape<64, 1, 64, 32, 2, 2> {};
template <>
struct FusedFor<96> : FusedShape<96, 2, 32, 16, 3, 2> {};
template <>
struct FusedFor<128> : FusedShape<128, 2, 16, 16, 3, 2> {};
template <>
struct FusedFor<192> : FusedShape<192, 1, 32, 32, 2, 1> {};

// Starts the copies of one stage, which has the hidden channels from `hidden` on.
template <class Shape>
RIFORMER_DEVICE void copy_stage(const BlockKernelArgs& args, unsigned char* stage, int hidden) {
  constexpr int C = Shape::kChannels;
  const auto* const fc1 = static_cast<const uint16_t*>(args.fc1_weight) + static_cast<int64_t>(hidden) * C;
  const auto* const fc2 = static_cast<const uint16_t*>(args.fc2_weight) + hidden;
  copy_tile<Shape::kPieces, Shape::kHidden, Shape::kThreads>(stage, fc1, 2 * C, Shape::kHidden, Shape::kPieces);
  copy_tile<Shape::kHiddenPieces, C, Shape::kThreads>(stage + Shape::kMatrixBytes, fc2,
                                                      2 * static_cast<int64_t>(args.hidden), C, Shape::kHiddenPieces);
  const int thread = thread_index();
  if (thread < Shape::kHidden / 4)
    copy_async_16(stage + 2 * Shape::kMatrixBytes + 16 * thread, args.constants + hidden + 4 * thread, true);
}

// The first product, for kStep hidden channels of a stage from `at` on. The sums start as the biases.
template <class T, class Shape>
RIFORMER_DEVICE void expand_step(float (&h)[Shape::kRowTiles][Shape::kStep / 8][4],
                                 const uint32_t (&z)[Shape::kChannels / 16][Shape::kRowTiles][4],
                                 const TileReader<Shape::kPieces, LaneOfB>& weights, const float* biases, int at,
                                 int lane) {
  RIFORMER_UNROLL
  for (int n = 0; n < Shape::kStep / 8; ++n) {
    const Pair bias = load_pair(biases + at + 8 * n + 2 * (lane % 4));
    RIFORMER_UNROLL
    for (int r = 0; r < Shape::kRowTiles; ++r) {
      h[r][n][0] = h[r][n][2] = bias.value[0];
      h[r][n][1] = h[r][n][3] = bias.value[1];
    }
  }
  RIFORMER_UNROLL
  for (int k = 0; k < Shape::kChannels / 16; ++k) {
    RIFORMER_UNROLL
    for (int n = 0; n < Shape::kStep / 16; ++n) {
      uint32_t b[4];
      weights.load(b, at + 16 * n, 16 * k);
      RIFORMER_UNROLL
      for (int r = 0; r < Shape::kRowTiles; ++r) {
        multiply_16x8x16<T>(h[r][2 * n], z[k][r], {b[0], b[1]});
        multiply_16x8x16<T>(h[r][2 * n + 1], z[k][r], {b[2], b[3]});
      }
    }
  }
}

// GELU of those sums, and the second product over these hidden channels. A lane's places in sums of 16 x 16 are its
// places in an operand, so no lane needs a value of another.
template <class T, class Shape>
RIFORMER_DEVICE void project_step(float (&sums)[Shape::kRowTiles][Shape::kPieces][4],
                                  const float (&h)[Shape::kRowTiles][Shape::kStep / 8][4],
                                  const TileReader<Shape::kHiddenPieces, LaneOfB>& weights, int at) {
  RIFORMER_UNROLL
  for (int k = 0; k < Shape::kStep / 16; ++k) {
    uint32_t a[Shape::kRowTiles][4];
    RIFORMER_UNROLL
    for (int r = 0; r < Shape::kRowTiles; ++r) {
      RIFORMER_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float* const pair = &h[r][2 * k + i / 2][i % 2 * 2];
        a[r][i] = pack<T>(gelu<T>(pair[0]), gelu<T>(pair[1]));
      }
    }
    RIFORMER_UNROLL
    for (int n = 0; n < Shape::kChannels / 16; ++n) {
      uint32_t b[4];
      weights.load(b, 16 * n, at + 16 * k);
      RIFORMER_UNROLL
      for (int r = 0; r < Shape::kRowTiles; ++r) {
        multiply_16x8x16<T>(sums[r][2 * n], a[r], {b[0], b[1]});
        multiply_16x8x16<T>(sums[r][2 * n + 1], a[r], {b[2], b[3]});
      }
    }
  }
}

template <class T, class Shape, RowMode Mode>
RIFORMER_KERNEL(Shape::kThreads, Shape::kPerMultiprocessor)
fused_kernel(RIFORMER_GRID_CONSTANT BlockKernelArgs args) {
  static_assert(sizeof(T) == 2, "a piece is eight channels");
  constexpr int C = Shape::kChannels, kTiles = Shape::kRowTiles;
  auto* const places = reinterpret_cast<SlotPlace*>(shared_memory());
  unsigned char* const tokens = shared_memory() + kPlaceBytes;
  unsigned char* const ring = tokens + Shape::kTokenBytes;
  const int thread = thread_index(), lane = thread % kWarp, warp = thread / kWarp;
  const int first_row = warp * 16 * kTiles;  // of the warp, in the thread block

  // Start the copies of x and of the first stages.
  RIFORMER_UNROLL
  for (int i = 0; i < Shape::kSlots; ++i) {
    const SlotPlace place = place_of<Mode>(args, thread_block_index() * Shape::kSlots + i);
    if (thread == 0) places[i] = place;
    copy_tile<Shape::kPieces, kSlotRows, Shape::kThreads>(tokens + i * kSlotRows * 2 * C,
                                                          static_cast<const uint16_t*>(args.x) + place.slot.first * C,
                                                          2 * C, place.slot.rows, Shape::kPieces);
  }
  RIFORMER_UNROLL
  for (int i = 0; i < Shape::kStages - 1; ++i) {
    if (i * Shape::kHidden < args.hidden) copy_stage<Shape>(args, ring + i * Shape::kStageBytes, i * Shape::kHidden);
    copy_async_commit();
  }
  // x came with the first stage. Norm it, in registers.
  copy_async_wait<Shape::kStages - 2>();
  sync_thread_block();
  uint32_t z[C / 16][kTiles][4];
  {
    WarpRows<kTiles, Mode> rows{};
    rows.find(args, places[first_row / kSlotRows], first_row % kSlotRows, lane);
    const TileReader<Shape::kPieces, LaneOfA> reader(tokens, lane);
    RIFORMER_UNROLL
    for (int k = 0; k < C / 16; ++k) {
      // Never true, as args.channels is C. The branch keeps the compiler from loading the maps of all channels at once,
      // for which there are not enough registers.
      if (16 * k >= args.channels) break;
      const int channel = 16 * k + 2 * (lane % 4);
      ChannelMaps<Mode == RowMode::position> maps;
      maps.load(rows.maps, channel, C);
      RIFORMER_UNROLL
      for (int r = 0; r < kTiles; ++r) reader.load(z[k][r], first_row + 16 * r, 16 * k);
      norm_fragments<T>(z[k], rows, maps, channel, C);
    }
  }

  float sums[kTiles][Shape::kPieces][4] = {};
  int current = 0;  // stage of the ring
  RIFORMER_NO_UNROLL
  for (int hidden = 0; hidden < args.hidden; hidden += Shape::kHidden) {
    // Wait for this stage. After the barrier all threads have it, and are done with the stage that is filled next.
    copy_async_wait<Shape::kStages - 2>();
    sync_thread_block();
    // Start the copies of a later stage.
    const int next = hidden + (Shape::kStages - 1) * Shape::kHidden;
    const int free = current ? current - 1 : Shape::kStages - 1;
    if (next < args.hidden) copy_stage<Shape>(args, ring + free * Shape::kStageBytes, next);
    copy_async_commit();
    // Both products over the hidden channels of this stage.
    const unsigned char* const stage = ring + current * Shape::kStageBytes;
    const TileReader<Shape::kPieces, LaneOfB> fc1(stage, lane);
    const TileReader<Shape::kHiddenPieces, LaneOfB> fc2(stage + Shape::kMatrixBytes, lane);
    const auto* const biases = reinterpret_cast<const float*>(stage + 2 * Shape::kMatrixBytes);
    RIFORMER_UNROLL
    for (int at = 0; at < Shape::kHidden; at += Shape::kStep) {
      float h[kTiles][Shape::kStep / 8][4];
      expand_step<T, Shape>(h, z, fc1, biases, at, lane);
      project_step<T, Shape>(sums, h, fc2, at);
    }
    current = current + 1 == Shape::kStages ? 0 : current + 1;
  }

  // Finish the rows in the place of x.
  {
    WarpRows<kTiles, Mode> rows{};
    rows.find(args, places[first_row / kSlotRows], first_row % kSlotRows, lane);
    finish_fragments<T, Shape::kPieces>(args, rows, tokens + first_row * 2 * C, 0, 0, sums, lane);
  }
  // Store them, and take the moments of each slot.
  sync_thread_block();
  for (int i = 0; i < Shape::kSlots; ++i) {
    const Slot at = places[i].slot;
    if (!at.rows) continue;
    const unsigned char* const tile = tokens + i * kSlotRows * 2 * C;
    const auto place = [&](int row, int piece) { return tile + SwizzledTile<Shape::kPieces>::offset(row, piece); };
    store_slot(place, at.rows, Shape::kPieces, static_cast<uint16_t*>(args.out) + at.first * C, 2 * C, thread,
               Shape::kThreads);
    if (args.partials)
      slot_moments<T>(place, at.rows, Shape::kPieces, warp, Shape::kWarps,
                      args.partials + (thread_block_index() * Shape::kSlots + i) * 2 * C, C);
  }
}

template <class Shape>
int64_t fused_thread_blocks(int64_t slots) {
  return (slots + Shape::kSlots - 1) / Shape::kSlots;
}

// Calls `act` with the shape for these channels. Returns false if there is none.
template <class Act>
bool with_fused_shape(int64_t channels, const Act& act) {
  switch (channels) {
    case 64: return act(FusedFor<64>{}), true;
    case 96: return act(FusedFor<96>{}), true;
    case 128: return act(FusedFor<128>{}), true;
    case 192: return act(FusedFor<192>{}), true;
    default: return false;
  }
}

inline std::string describe_fused(int64_t channels) {
  std::ostringstream out;
  if (!with_fused_shape(channels, [&](auto shape) {
        using Shape = decltype(shape);
        out << "sm80 fused, " << Shape::kRows << " rows x " << Shape::kChannels << " channels, " << Shape::kHidden
            << " hidden at a time, " << Shape::kWarps << " warps, " << Shape::kStages << " stages";
      }))
    out << "sm80 fused, no kernel for " << channels << " channels";
  return out.str();
}

template <class T>
void launch_fused(const BlockKernelArgs& args, const Device& device) {
  const int64_t slots = slot_count(args.rows, args.positions, args.slots_per_image);
  const bool found = with_fused_shape(args.channels, [&](auto shape) {
    using Shape = decltype(shape);
    if (args.hidden % Shape::kHidden)
      throw std::runtime_error("riformer: " + describe_fused(args.channels) + " does not take " +
                               std::to_string(args.hidden) + " hidden channels; use the pair of kernels");
    Launch how{"riformer block sm80 fused", fused_thread_blocks<Shape>(slots), Shape::kThreads, Shape::kSharedBytes};
    how.stream = device.stream;
    with_row_mode(args, [&](auto mode) { launch(fused_kernel<T, Shape, decltype(mode)::value>, how, args); });
  });
  if (!found) throw std::runtime_error("riformer: " + describe_fused(args.channels));
}

}  // namespace riformer::cuda::sm80
