// `embed` on the host: the choice of a tile, and the kernels that first rearrange the weight or the images where they
// do not lie as the kernel in embed_sm80.h reads them.
#pragma once

#include "embed_sm80.h"

namespace riformer::cuda {

constexpr int kArrangeThreads = 256;

// Rearranges the weight [C, KH, KW, Cin] to [C, KH, Cin, padded KW], with zeros behind KW. A thread writes a piece.
struct ArrangeWeightArgs {
  const void* weight;
  void* out;
  int64_t pieces;  // of the whole result
  int in_channels, kernel_height, kernel_width, inner;
};
template <class T>
RIFORMER_KERNEL(kArrangeThreads, 1)
arrange_weight_kernel(RIFORMER_GRID_CONSTANT ArrangeWeightArgs args) {
  constexpr int kValues = kPerPiece<T>;
  const int64_t at = thread_block_index() * kArrangeThreads + thread_index();
  if (at >= args.pieces) return;
  const int64_t taps = at / args.inner, outer = taps / args.in_channels;  // `outer` counts channels and kh
  const int kw = static_cast<int>(at % args.inner) * kValues, ci = static_cast<int>(taps % args.in_channels);
  const T* const from = static_cast<const T*>(args.weight) + (outer * args.kernel_width + kw) * args.in_channels + ci;
  float values[kValues];
  RIFORMER_UNROLL
  for (int j = 0; j < kValues; ++j) values[j] = kw + j < args.kernel_width ? to_float(from[j * args.in_channels]) : 0.f;
  store_16(static_cast<Vec16*>(args.out) + at, pack_piece<T>(values));
}

// Rearranges images of any strides and dtype to [B, H, W, Cin] in the result's dtype, from which the kernel copies. A
// thread writes a piece. Neighbouring threads take neighbouring pixels, because this kernel is for NCHW, where these
// lie together. It costs one reading and one writing of the images. The engine never needs it, as its own tokens have
// contiguous channels.
struct ArrangeImagesArgs {
  const void* x;
  DType x_dtype;
  void* out;
  int64_t batch, pixels;  // H * W
  int64_t stride_batch, stride_channel, stride_row, stride_column;
  int in_channels, width;
};
template <class T>
RIFORMER_KERNEL(kArrangeThreads, 1)
arrange_images_kernel(RIFORMER_GRID_CONSTANT ArrangeImagesArgs args) {
  constexpr int kValues = kPerPiece<T>;
  const int64_t at = thread_block_index() * kArrangeThreads + thread_index();
  const int64_t pieces = args.in_channels / kValues;
  if (at >= args.batch * args.pixels * pieces) return;
  const int64_t pixel = at % args.pixels, piece = at / args.pixels % pieces, image = at / args.pixels / pieces;
  const int64_t from = image * args.stride_batch + piece * kValues * args.stride_channel +
                       pixel / args.width * args.stride_row + pixel % args.width * args.stride_column;
  const Vec16 found = with_dtype_on_device(args.x_dtype, [&](auto element) {
    const auto* const x = static_cast<const decltype(element)*>(args.x);
    float values[kValues];
    RIFORMER_UNROLL
    for (int j = 0; j < kValues; ++j) values[j] = to_float(x[from + j * args.stride_channel]);
    return pack_piece<T>(values);
  });
  store_16(static_cast<Vec16*>(args.out) + (image * args.pixels + pixel) * pieces + piece, found);
}

// How `embed` runs: a pure function of the shapes, the strides and the alignment of x.
struct EmbedPlan {
  bool gather;          // whether rows are gathered or copied, see embed_sm80.h
  bool arrange_images;  // whether arrange_images_kernel runs first
  int inner;            // see EmbedKernelArgs
  int64_t pieces;       // that the sum of one result runs over
  int slots, columns;
  int64_t weight_bytes, images_bytes, partials_bytes;  // the parts of the workspace, in this order

  int64_t workspace() const { return weight_bytes + images_bytes + partials_bytes; }
};

inline int64_t aligned_bytes(int64_t bytes) { return ceil_divide(bytes, 256) * 256; }

// The strides of dimensions of size 1 mean nothing. They are replaced by plain ones, so that nothing below has to ask.
inline EmbedArgs with_plain_strides(EmbedArgs args) {
  if (args.batch == 1) args.stride_batch = 0;
  if (args.in_channels == 1) args.stride_channel = 1;
  if (args.height == 1) args.stride_row = 0;
  if (args.width == 1) args.stride_column = 0;
  return args;
}

// Whether the channels of each pixel lie in aligned pieces.
inline bool lies_in_pieces(const EmbedArgs& args) {
  const int64_t values = 16 / size_of(args.dtype);
  return args.x_dtype == args.dtype && args.stride_channel == 1 && reinterpret_cast<uintptr_t>(args.x) % 16 == 0 &&
         args.stride_batch % values == 0 && args.stride_row % values == 0 && args.stride_column % values == 0;
}

// Whether pixels 2 i and 2 i + 1 of a row can be loaded as one, and every window starts at an even pixel.
inline bool lies_in_pairs(const EmbedArgs& args) {
  return args.stride_column == 1 && args.width % 2 == 0 && args.stride % 2 == 0 && args.padding % 2 == 0 &&
         reinterpret_cast<uintptr_t>(args.x) % (2 * size_of(args.x_dtype)) == 0 && args.stride_batch % 2 == 0 &&
         args.stride_channel % 2 == 0 && args.stride_row % 2 == 0;
}

// The number of columns among `choices` whose tiles waste the fewest columns; of two equal ones the later.
template <size_t N>
int fitting_columns(int64_t channels, const int (&choices)[N]) {
  int best = choices[0];
  for (const int columns : choices)
    if (ceil_divide(channels, columns) * columns <= ceil_divide(channels, best) * best) best = columns;
  return best;
}

// Tiles are two slots x many columns if there are enough of them for all multiprocessors, and one slot x 64 columns
// otherwise. This may depend on the batch, because no result depends on the tile.
inline EmbedPlan embed_plan(const EmbedArgs& given) {
  const EmbedArgs args = with_plain_strides(given);
  const int64_t size = size_of(args.dtype), values = 16 / size;
  EmbedPlan plan{};
  plan.gather = args.in_channels % values != 0;
  plan.arrange_images = !plan.gather && !lies_in_pieces(args);
  plan.inner = static_cast<int>(ceil_divide(plan.gather ? args.kernel_width : args.in_channels, values));
  plan.pieces = args.kernel_height * (plan.gather ? args.in_channels : args.kernel_width) * plan.inner;
  const int64_t positions = args.out_height * args.out_width, slots = args.batch * slots_in_image(positions);
  const int columns =
      plan.gather ? fitting_columns(args.channels, {96, 64}) : fitting_columns(args.channels, {96, 128});
  const bool large = size == 2 && ceil_divide(slots, 2) * ceil_divide(args.channels, columns) >= args.device.processors;
  plan.slots = large ? 2 : 1;
  plan.columns = large ? columns : 64;
  plan.weight_bytes = plan.gather ? aligned_bytes(args.channels * plan.pieces * 16) : 0;
  plan.images_bytes =
      plan.arrange_images ? aligned_bytes(args.batch * args.height * args.width * args.in_channels * size) : 0;
  plan.partials_bytes =
      args.moments && slots_in_image(positions) > 1 ? partials_count(args.batch, positions, args.channels) * 4 : 0;
  return plan;
}

template <class T, int Slots, int Columns, bool Gather>
void launch_embed_tile(const EmbedKernelArgs& args, const Device& device) {
  using Tile = EmbedTile<T, Slots, Columns>;
  const int64_t thread_blocks = ceil_divide(args.slots, Slots) * ceil_divide(args.channels, Columns);
  launch(embed_kernel<T, Slots, Columns, Gather>,
         {Gather ? "embed, gathered" : "embed", thread_blocks, Tile::kThreads, Tile::kShared, 1, device.stream}, args);
}

template <class T>
void launch_embed_kernel(const EmbedKernelArgs& args, const EmbedPlan& plan, const Device& device) {
  if (plan.slots == 1) {
    if (plan.gather)
      launch_embed_tile<T, 1, 64, true>(args, device);
    else
      launch_embed_tile<T, 1, 64, false>(args, device);
  }
  if constexpr (sizeof(T) == 2) {
    if (plan.slots == 2 && plan.gather) {
      if (plan.columns == 64) launch_embed_tile<T, 2, 64, true>(args, device);
      if (plan.columns == 96) launch_embed_tile<T, 2, 96, true>(args, device);
    }
    if (plan.slots == 2 && !plan.gather) {
      if (plan.columns == 96) launch_embed_tile<T, 2, 96, false>(args, device);
      if (plan.columns == 128) launch_embed_tile<T, 2, 128, false>(args, device);
    }
  }
}

// Starts the kernels for tokens of T.
template <class T>
void launch_embed_of(const EmbedArgs& given, const EmbedPlan& plan) {
  EmbedArgs args = with_plain_strides(given);
  unsigned char* const workspace = static_cast<unsigned char*>(args.workspace);
  float* const partials = reinterpret_cast<float*>(workspace + plan.weight_bytes + plan.images_bytes);
  const int64_t positions = args.out_height * args.out_width, slots = slots_in_image(positions);
  const auto in_channels = static_cast<int>(args.in_channels), kernel_height = static_cast<int>(args.kernel_height),
             kernel_width = static_cast<int>(args.kernel_width), width = static_cast<int>(args.width);
  if (plan.gather) {
    const int64_t pieces = args.channels * plan.pieces;
    launch(arrange_weight_kernel<T>,
           {"embed, weight", ceil_divide(pieces, kArrangeThreads), kArrangeThreads, 0, 1, args.device.stream},
           ArrangeWeightArgs{args.weight, workspace, pieces, in_channels, kernel_height, kernel_width, plan.inner});
  }
  const bool pairs = plan.gather && lies_in_pairs(args);
  if (plan.arrange_images) {
    void* const images = workspace + plan.weight_bytes;
    const int64_t pixels = args.height * args.width;
    launch(arrange_images_kernel<T>,
           {"embed, images", ceil_divide(args.batch * pixels * args.in_channels / kPerPiece<T>, kArrangeThreads),
            kArrangeThreads, 0, 1, args.device.stream},
           ArrangeImagesArgs{args.x, args.x_dtype, images, args.batch, pixels, args.stride_batch, args.stride_channel,
                             args.stride_row, args.stride_column, in_channels, width});
    args.x = images;
    args.x_dtype = args.dtype;
    args.stride_channel = 1;
    args.stride_column = args.in_channels;
    args.stride_row = args.width * args.in_channels;
    args.stride_batch = pixels * args.in_channels;
  }
  EmbedKernelArgs kernel{};
  kernel.x = args.x;
  kernel.x_dtype = args.x_dtype;
  kernel.stride_batch = args.stride_batch;
  kernel.stride_channel = args.stride_channel;
  kernel.stride_row = args.stride_row;
  kernel.stride_column = args.stride_column;
  kernel.in_channels = in_channels;
  kernel.height = static_cast<int>(args.height);
  kernel.width = width;
  kernel.kernel_height = kernel_height;
  kernel.kernel_width = kernel_width;
  kernel.stride = static_cast<int>(args.stride);
  kernel.padding = static_cast<int>(args.padding);
  kernel.weight = plan.gather ? workspace : args.weight;
  kernel.bias = args.bias;
  kernel.out = args.out;
  kernel.partials = !args.moments ? nullptr : slots == 1 ? args.moments : partials;
  kernel.slots = args.batch * slots;
  kernel.slots_per_image = slots;
  kernel.positions = positions;
  kernel.out_width = static_cast<int>(args.out_width);
  kernel.channels = static_cast<int>(args.channels);
  kernel.pieces = static_cast<int>(plan.pieces);
  kernel.inner = plan.inner;
  kernel.pairs = pairs;
  launch_embed_kernel<T>(kernel, plan, args.device);
  if (args.moments && slots > 1)
    launch_merge(partials, args.moments, args.batch, positions, slots, args.channels, args.device);
}

inline void launch_embed(const EmbedArgs& args) {
  check_dtypes({args.x_dtype, args.bias.dtype});
  with_served_dtype(args.dtype, [&](auto element) { launch_embed_of<decltype(element)>(args, embed_plan(args)); });
}

}  // namespace riformer::cuda
