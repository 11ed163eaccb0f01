// `embed`, the stem and the downsamplings: a convolution as an implicit matrix product, and the moments of its result.
// The kernel runs on sm_80 and on everything later.
//
// Rows are output positions, in slots of 64 of one image. Columns are output channels. The sum runs over the window in
// pieces of 16 bytes (8 values, or 4 of float32), four pieces to a step. There are two ways to load the rows:
//   copied, if Cin is a multiple of a piece: a piece is neighbouring channels at one tap, and the sum runs in the order
//     (kh, kw, cin). Asynchronous copies read the tokens where they lie, and write zeros for pixels outside the image.
//   gathered, if there are few channels (the stem): a piece is neighbouring pixels of one channel, and the sum runs in
//     the order (kh, cin, kw), with kw padded to a multiple of a piece. So there is one address and one test of the row
//     for eight values, and two pixels are loaded at a time where they are aligned. arrange_weight_kernel brings the
//     weight into this order first.
// Every sum is one chain of additions over the steps, whatever the tile. So the tile may depend on the batch.
//
// An own kernel and not cuDNN's, because of the bytes: a pass for the moments of cuDNN's result would read 0.78 MB per
// image again (S12 at 224 pixels), and a stem in channels_last another 2.2 MB. An estimate; nothing of it is measured.
#pragma once

#include "moments.h"

namespace riformer::cuda {

constexpr int kEmbedStages = 4;
constexpr int kStepPieces = 4;  // 64 bytes of a row

struct EmbedKernelArgs {
  const void* x;
  DType x_dtype;  // that of the result where rows are copied
  int64_t stride_batch, stride_channel, stride_row, stride_column;
  int in_channels, height, width, kernel_height, kernel_width, stride, padding;
  const void* weight;  // [C, pieces] in the order of the sum
  Parameter bias;
  void* out;        // [B, N, C]
  float* partials;  // [slots, 2, C], or null
  int64_t slots, slots_per_image, positions;
  int out_width, channels;
  int pieces;  // that the sum runs over
  int inner;   // pieces of the channels (copied), or of a row of kw (gathered)
  bool pairs;  // whether two neighbouring pixels may be loaded as one
};

// Where a piece lies in a tile whose rows have 64 bytes. The same piece of eight consecutive rows lies in eight
// different groups of banks, for ldmatrix.
RIFORMER_DEVICE int step_offset(int row, int piece) { return row * 64 + 16 * (piece ^ (row / 2 % 4)); }

// A place in the sum, as outer, middle and inner: (kh, kw, piece of channels) or (kh, cin, piece of kw).
struct PieceIndex {
  int inner, middle, outer;

  RIFORMER_DEVICE PieceIndex(int piece, int inners, int middles)
      : inner(piece % inners), middle(piece / inners % middles), outer(piece / inners / middles) {}
  RIFORMER_DEVICE void advance(int inners, int middles) {
    inner += kStepPieces;
    while (inner >= inners) {
      inner -= inners;
      if (++middle == middles) {
        middle = 0;
        ++outer;
      }
    }
  }
};

// The window of an output position.
struct Window {
  int64_t base;   // where its first pixel lies in memory, or would lie if it were inside the image
  int top, left;  // that pixel's row and column

  RIFORMER_DEVICE Window(const EmbedKernelArgs& args, int64_t slot, int row) : base(0), top(-(1 << 30)), left(0) {
    const int64_t image = slot / args.slots_per_image;
    const int64_t position = (slot - image * args.slots_per_image) * kSlotRows + row;
    // A row that does not exist keeps a `top` with which no pixel is inside the image.
    if (slot >= args.slots || position >= args.positions) return;
    top = static_cast<int>(position) / args.out_width * args.stride - args.padding;
    left = static_cast<int>(position) % args.out_width * args.stride - args.padding;
    base = image * args.stride_batch + top * args.stride_row + left * args.stride_column;
  }
};
// Whether 0 <= value < limit.
RIFORMER_DEVICE bool below(int value, int limit) { return static_cast<uint32_t>(value) < static_cast<uint32_t>(limit); }

// What a thread loads of the rows of each step, where they are copied: one piece of two rows.
template <class T, int Slots>
struct CopiedRows {
  static constexpr int kThreads = 128 * Slots;
  const EmbedKernelArgs& args;
  PieceIndex at;
  Window windows[2];

  RIFORMER_DEVICE CopiedRows(const EmbedKernelArgs& all, int64_t slot)
      : args(all),
        at(thread_index() % kStepPieces, all.inner, all.kernel_width),
        windows{Window(all, slot, thread_index() / kStepPieces), second(all, slot)} {}
  static RIFORMER_DEVICE Window second(const EmbedKernelArgs& all, int64_t slot) {
    const int row = thread_index() / kStepPieces + kThreads / kStepPieces;
    return Window(all, slot + row / kSlotRows, row % kSlotRows);
  }
  RIFORMER_DEVICE void load(unsigned char* to) {
    const int64_t offset = at.outer * args.stride_row + at.middle * args.stride_column + at.inner * kPerPiece<T>;
    RIFORMER_UNROLL
    for (int i = 0; i < 2; ++i) {
      const bool inside = at.outer < args.kernel_height && below(windows[i].top + at.outer, args.height) &&
                          below(windows[i].left + at.middle, args.width);
      copy_async_16(to + step_offset(thread_index() / kStepPieces, thread_index() % kStepPieces) + i * 16 * kThreads,
                    static_cast<const T*>(args.x) + windows[i].base + offset, inside);
    }
    at.advance(args.inner, args.kernel_width);
  }
};

template <class X>
struct alignas(2 * sizeof(X)) PixelPair {
  X first, second;
};

// What a thread loads of the rows of each step, where they are gathered: two pieces of one row.
template <class T, int Slots>
struct GatheredRows {
  static constexpr int kRows = kSlotRows * Slots;
  const EmbedKernelArgs& args;
  PieceIndex at[2];
  int row;
  Window window;

  RIFORMER_DEVICE GatheredRows(const EmbedKernelArgs& all, int64_t slot)
      : args(all),
        at{PieceIndex(thread_index() / kRows, all.inner, all.in_channels),
           PieceIndex(thread_index() / kRows + 2, all.inner, all.in_channels)},
        row(thread_index() % kRows),
        window(all, slot + row / kSlotRows, row % kSlotRows) {}

  template <class X>
  RIFORMER_DEVICE Vec16 gathered(const PieceIndex& piece) const {
    constexpr int kValues = kPerPiece<T>;
    const int kw = piece.inner * kValues, left = window.left + kw;
    const bool row_inside = piece.outer < args.kernel_height && below(window.top + piece.outer, args.height);
    const X* const from = static_cast<const X*>(args.x) + window.base + piece.outer * args.stride_row +
                          piece.middle * args.stride_channel + kw * args.stride_column;
    float values[kValues];
    if (args.pairs) {
      RIFORMER_UNROLL
      for (int j = 0; j < kValues; j += 2) {
        const bool inside = row_inside && kw + j < args.kernel_width && below(left + j, args.width);
        const PixelPair<X> pair = inside ? *reinterpret_cast<const PixelPair<X>*>(from + j) : PixelPair<X>{};
        values[j] = to_float(pair.first);
        values[j + 1] = kw + j + 1 < args.kernel_width ? to_float(pair.second) : 0.f;
      }
    } else {
      RIFORMER_UNROLL
      for (int j = 0; j < kValues; ++j) {
        const bool inside = row_inside && kw + j < args.kernel_width && below(left + j, args.width);
        values[j] = inside ? to_float(from[j * args.stride_column]) : 0.f;
      }
    }
    return pack_piece<T>(values);
  }
  RIFORMER_DEVICE void load(unsigned char* to) {
    RIFORMER_UNROLL
    for (int i = 0; i < 2; ++i) {
      Vec16 piece;
      with_dtype_on_device(args.x_dtype, [&](auto element) { piece = gathered<decltype(element)>(at[i]); });
      store_16(to + step_offset(row, thread_index() / kRows + 2 * i), piece);
      at[i].advance(args.inner, args.in_channels);
    }
  }
};

// The sums of a warp, 32 rows x Columns / 2 columns, for 16-bit operands: fragments of mma.m16n8k16.
template <class T, int Columns>
struct WarpProduct {
  static constexpr int kColumns = Columns / 2;
  float sum[2][kColumns / 8][4] = {};

  RIFORMER_DEVICE void add(const unsigned char* rows, const unsigned char* columns) {
    const int lane = thread_index() % kWarp;
    RIFORMER_UNROLL
    for (int k = 0; k < kStepPieces; k += 2) {
      uint32_t a[2][4];
      RIFORMER_UNROLL
      for (int i = 0; i < 2; ++i) load_matrix_x4(a[i], rows + step_offset(16 * i + lane % 16, k + lane / 16));
      RIFORMER_UNROLL
      for (int j = 0; j < kColumns; j += 16) {
        uint32_t b[4];
        load_matrix_x4(b, columns + step_offset(j + lane % 8 + lane / 16 * 8, k + lane / 8 % 2));
        const uint32_t halves[2][2] = {{b[0], b[1]}, {b[2], b[3]}};
        RIFORMER_UNROLL
        for (int i = 0; i < 2; ++i) {
          multiply_16x8x16<T>(sum[i][j / 8], a[i], halves[0]);
          multiply_16x8x16<T>(sum[i][j / 8 + 1], a[i], halves[1]);
        }
      }
    }
  }
  RIFORMER_DEVICE void store(unsigned char* tile, int pitch, const float* bias) const {
    const int lane = thread_index() % kWarp;
    RIFORMER_UNROLL
    for (int i = 0; i < 4; ++i) {
      RIFORMER_UNROLL
      for (int j = 0; j < kColumns / 8; ++j) {
        const int column = 8 * j + 2 * (lane % 4);
        const float* const two = sum[i / 2][j] + 2 * (i % 2);
        const uint32_t word = pack<T>(two[0] + bias[column], two[1] + bias[column + 1]);
        std::memcpy(tile + (lane / 4 + 8 * i) * pitch + 2 * column, &word, 4);
      }
    }
  }
};

// The same for float32. Lane l has rows l / 4 + 8 i and columns l % 4 + 4 j. The 16 terms of a step are summed on their
// own and then added, because one chain over thousands of terms has a larger error than PyTorch's sums, which are made
// of parts too.
template <int Columns>
struct WarpProduct<float, Columns> {
  static constexpr int kColumns = Columns / 2;
  float sum[4][kColumns / 4] = {};

  RIFORMER_DEVICE void add(const unsigned char* rows, const unsigned char* columns) {
    const int lane = thread_index() % kWarp;
    float step[4][kColumns / 4] = {};
    RIFORMER_UNROLL
    for (int k = 0; k < kStepPieces; ++k) {
      float a[4][4], b[4];
      RIFORMER_UNROLL
      for (int i = 0; i < 4; ++i) unpack_piece<float>(load_16(rows + step_offset(lane / 4 + 8 * i, k)), a[i]);
      RIFORMER_UNROLL
      for (int j = 0; j < kColumns / 4; ++j) {
        unpack_piece<float>(load_16(columns + step_offset(lane % 4 + 4 * j, k)), b);
        RIFORMER_UNROLL
        for (int i = 0; i < 4; ++i) {
          RIFORMER_UNROLL
          for (int v = 0; v < 4; ++v) step[i][j] = multiply_add(a[i][v], b[v], step[i][j]);
        }
      }
    }
    RIFORMER_UNROLL
    for (int i = 0; i < 4; ++i) {
      RIFORMER_UNROLL
      for (int j = 0; j < kColumns / 4; ++j) sum[i][j] += step[i][j];
    }
  }
  RIFORMER_DEVICE void store(unsigned char* tile, int pitch, const float* bias) const {
    const int lane = thread_index() % kWarp;
    RIFORMER_UNROLL
    for (int i = 0; i < 4; ++i) {
      RIFORMER_UNROLL
      for (int j = 0; j < kColumns / 4; ++j) {
        const int column = lane % 4 + 4 * j;
        const float value = sum[i][j] + bias[column];
        std::memcpy(tile + (lane / 4 + 8 * i) * pitch + 4 * column, &value, 4);
      }
    }
  }
};

template <class T, int Slots, int Columns>
struct EmbedTile {
  static constexpr int kThreads = 128 * Slots, kRows = kSlotRows * Slots;
  static constexpr int kStage = (kRows + Columns) * 64;
  // Bytes of a row of the result, with a piece that is not used: it keeps eight rows in different groups of banks.
  static constexpr int kPitch = Columns * kElementBytes<T> + 16;
  static constexpr int kBias = kStage * kEmbedStages;
  static constexpr int kShared = kBias + Columns * 4;
  static_assert(kRows * kPitch <= kBias, "the result takes the place of the stages");
};

// A thread block makes one tile of `Slots` slots x `Columns` channels; each warp has 32 rows x half of the columns.
// Shared memory: a ring of four stages, each [rows, 64 bytes] and [columns, 64 bytes], then the bias in float32. The
// result takes the place of the stages; from there it is stored and its moments are taken. Cost of a step of 32 k for a
// warp of 32 x 64: 32 mma (about 50 cycles of the matrix units) and 12 ldmatrix (48 cycles of shared memory).
template <class T, int Slots, int Columns, bool Gather>
RIFORMER_KERNEL(128 * Slots, 2)
embed_kernel(RIFORMER_GRID_CONSTANT EmbedKernelArgs args) {
  using Tile = EmbedTile<T, Slots, Columns>;
  using Rows = std::conditional_t<Gather, GatheredRows<T, Slots>, CopiedRows<T, Slots>>;
  constexpr int kThreads = Tile::kThreads;
  unsigned char* const shared = shared_memory();
  const int64_t groups = ceil_divide(args.channels, Columns);
  const int64_t slot = thread_block_index() / groups * Slots;
  const int column = static_cast<int>(thread_block_index() % groups) * Columns;
  const int warp = thread_index() / kWarp, warp_row = warp / 2 * 32, warp_column = warp % 2 * (Columns / 2);
  float* const bias = reinterpret_cast<float*>(shared + Tile::kBias);
  for (int c = thread_index(); c < Columns; c += kThreads)
    bias[c] = args.bias.data && column + c < args.channels ? load_parameter(args.bias, column + c) : 0.f;

  // `load` starts to load a step, and is called for the steps in order. Of the weight, a thread copies one piece of
  // every kStride-th column.
  Rows rows(args, slot);
  const int steps = (args.pieces + kStepPieces - 1) / kStepPieces;
  const auto stage = [&](int step) { return shared + step % kEmbedStages * Tile::kStage; };
  constexpr int kStride = kThreads / kStepPieces;
  const int first_piece = thread_index() % kStepPieces, first_column = thread_index() / kStepPieces;
  const Vec16* weight =
      static_cast<const Vec16*>(args.weight) + static_cast<int64_t>(column + first_column) * args.pieces + first_piece;
  const auto load = [&](int step) {
    if (step < steps) {
      rows.load(stage(step));
      unsigned char* const to = stage(step) + Tile::kRows * 64 + step_offset(first_column, first_piece);
      const bool inside = step * kStepPieces + first_piece < args.pieces;
      RIFORMER_UNROLL
      for (int c = 0; c < Columns; c += kStride) {
        if (Columns % kStride && c + first_column >= Columns) break;
        copy_async_16(to + c * 64, weight + static_cast<int64_t>(c) * args.pieces,
                      inside && column + first_column + c < args.channels);
      }
      weight += kStepPieces;
    }
    copy_async_commit();
  };
  RIFORMER_NO_UNROLL
  for (int step = 0; step < kEmbedStages - 1; ++step) load(step);
  // Whether this warp has any columns. Of 320 channels, half of the third tile of 128 is empty; its warps only copy.
  const bool used = column + warp_column < args.channels;
  WarpProduct<T, Columns> product;
  RIFORMER_NO_UNROLL
  for (int step = 0; step < steps; ++step) {
    // Wait for this step. After the barrier all threads have it, and are done with the stage that is filled next.
    copy_async_wait<kEmbedStages - 2>();
    sync_thread_block();
    load(step + kEmbedStages - 1);
    if (used) product.add(stage(step) + warp_row * 64, stage(step) + (Tile::kRows + warp_column) * 64);
  }
  // The result, with the bias, in the place of the stages.
  copy_async_wait<0>();
  sync_thread_block();
  product.store(shared + warp_row * Tile::kPitch + warp_column * kElementBytes<T>, Tile::kPitch, bias + warp_column);
  sync_thread_block();

  // Store it, and take the moments of each slot.
  const int left = args.channels - column, pieces = (left < Columns ? left : Columns) / kPerPiece<T>;
  RIFORMER_NO_UNROLL
  for (int i = 0; i < Slots; ++i) {
    if (slot + i >= args.slots) break;
    const Slot found =
        slot_at(slot + i, args.slots / args.slots_per_image * args.positions, args.positions, args.slots_per_image);
    const auto at = [&](int row, int piece) { return shared + (i * kSlotRows + row) * Tile::kPitch + 16 * piece; };
    store_slot(at, found.rows, pieces, static_cast<T*>(args.out) + found.first * args.channels + column,
               args.channels * static_cast<int64_t>(sizeof(T)), thread_index(), kThreads);
    if (args.partials && warp / 4 == i)
      slot_moments<T>(at, found.rows, pieces, warp % 4, 4, args.partials + (slot + i) * 2 * args.channels + column,
                      args.channels);
  }
}

}  // namespace riformer::cuda
