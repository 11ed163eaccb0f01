// The checks of `embed`, `norm`, `head`, and of the conversions between dtypes.
#pragma once

#include "check_block.h"

namespace kernel_check {

using riformer::cpu::EmbedArgs;
using riformer::cpu::HeadArgs;
using riformer::cpu::NormArgs;

struct EmbedCase {
  Convolution c;
  DType images, dtype;
  bool channels_last, bias;

  std::string text() const {
    char line[160];
    std::snprintf(line, sizeof(line), "embed %s to %s, [%d, %d, %d, %d], %d channels, kernel %dx%d, stride %d%s%s",
                  name_of(images), name_of(dtype), static_cast<int>(c.batch), static_cast<int>(c.in_channels),
                  static_cast<int>(c.height), static_cast<int>(c.width), static_cast<int>(c.channels),
                  static_cast<int>(c.kernel_height), static_cast<int>(c.kernel_width), static_cast<int>(c.stride),
                  channels_last ? ", channels_last" : "", bias ? "" : ", no bias");
    return line;
  }
};

// [outer][channels][inner] to [outer][inner][channels]
inline Values transposed(const Values& from, int64_t outer, int64_t channels, int64_t inner) {
  Values to(from.size());
  for (int64_t o = 0; o < outer; ++o)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < inner; ++i)
        to[static_cast<size_t>((o * inner + i) * channels + c)] =
            from[static_cast<size_t>((o * channels + c) * inner + i)];
  return to;
}

inline void check_embed(const Kernels& kernels, const EmbedCase& given, Report& report) {
  report.begin(given.text());
  const Convolution& c = given.c;
  const Shape to{c.batch, c.channels, c.out_height() * c.out_width()};
  const int64_t fan = c.in_channels * c.kernel_height * c.kernel_width, area = c.height * c.width;
  const bool last = given.channels_last && c.in_channels % 2 == 0;  // as the bindings have it, for weights
  Values ours, eager, golden, alone;
  const int draws = draws_of(to.count());
  for (int i = 0; i < draws; ++i) {
    Draw draw{static_cast<uint64_t>(100 + i)};
    const Values x = draw.normals(c.batch * c.in_channels * area, 1, 0.2, given.images);
    const Values weight = draw.normals(c.channels * fan, 1 / std::sqrt(static_cast<double>(fan)), 0, given.dtype);
    const Values bias = given.bias ? draw.normals(c.channels, 0.25, 0, given.dtype) : Values{};
    const Tensor image(given.images, given.channels_last ? transposed(x, c.batch, c.in_channels, area) : x);
    const Tensor w(given.dtype,
                   last ? transposed(weight, c.channels, c.in_channels, c.kernel_height * c.kernel_width) : weight);
    const Tensor shift(given.dtype, bias), out(given.dtype, to.count()), moments(DType::f32, 2 * c.batch * c.channels);
    EmbedArgs args{};
    args.x = image.memory.data();
    args.x_dtype = given.images;
    args.batch = c.batch;
    args.in_channels = c.in_channels;
    args.height = c.height;
    args.width = c.width;
    args.stride_batch = c.in_channels * area;
    args.stride_channel = given.channels_last ? 1 : area;
    args.stride_row = given.channels_last ? c.width * c.in_channels : c.width;
    args.stride_column = given.channels_last ? c.in_channels : 1;
    args.weight = w.parameter();
    args.bias = given.bias ? shift.parameter() : riformer::cpu::Parameter{};
    args.weight_channels_last = last;
    args.channels = c.channels;
    args.kernel_height = c.kernel_height;
    args.kernel_width = c.kernel_width;
    args.stride = c.stride;
    args.padding = c.padding;
    args.out_height = c.out_height();
    args.out_width = c.out_width();
    args.out = out.memory.data();
    args.dtype = given.dtype;
    args.moments_out = BlockCall::moments_of(moments);
    args.pool = pool(1);
    report.add(given.text(), kernels.embed(args) ? " no memory" : "");
    const auto bits = out.bits();
    const Values found = out.get();
    report.add(given.text(), wrong_moments(moments.get(), found, to));
    args.pool = pool(3);
    report.add(given.text(), kernels.embed(args) ? " no memory" : "");
    report.add(given.text(), out.bits() == bits ? "" : " other bits with other threads");
    args.x = image.memory.data() + (c.batch - 1) * args.stride_batch * riformer::size_of(given.images);
    args.batch = 1;
    report.add(given.text(), kernels.embed(args) ? " no memory" : "");
    const auto first = out.bits();
    const auto image_bytes = static_cast<int64_t>(bits.size()) / c.batch;
    report.add(given.text(), std::equal(bits.end() - image_bytes, bits.end(), first.begin())
                                 ? ""
                                 : " other bits alone than in a batch");
    const bool whole = out.memory.pattern_is_whole() && moments.memory.pattern_is_whole();
    report.add(given.text(), whole ? "" : " memory before a tensor was written to");
    // Eager converts the images to the dtype of the result first.
    Values read = x;
    for (double& value : read) value = rounded(value, given.dtype);
    const auto append = [](Values& all, const Values& more) { all.insert(all.end(), more.begin(), more.end()); };
    append(ours, found);
    append(eager, embed(Eager{given.dtype}, read, weight, bias, c));
    append(golden, embed(Golden{}, x, weight, bias, c));
  }
  report.add(given.text(), ratios(ours, eager, golden, {to.batch * draws, to.channels, to.positions}), given.dtype);
}

inline void check_norm(const Kernels& kernels, Shape s, DType from, DType to, bool per_position, double spread,
                       double mean, Report& report) {
  char text[120];
  std::snprintf(text, sizeof(text), "norm %s to %s, [%d, %d, %d], %s, x %g +- %g", name_of(from), name_of(to),
                static_cast<int>(s.batch), static_cast<int>(s.channels), static_cast<int>(s.positions),
                per_position ? "LN" : "GN", mean, spread);
  report.begin(text);
  Draw draw{11};
  const Values x = draw.normals(s.count(), spread, mean, from), weight = draw.normals(s.channels, 0.25, 1, from),
               bias = draw.normals(s.channels, 0.25, 0, from);
  const Tensor in(from, x), w(from, weight), shift(from, bias), moments(DType::f32, 2 * s.batch * s.channels),
      out(to, s.count());
  const MomentsArgs of_x{in.memory.data(), from, s.batch, s.channels, s.positions, BlockCall::moments_of(moments),
                         pool(2)};
  report.add(text, kernels.moments(of_x) ? " no memory" : wrong_moments(moments.get(), x, s));
  NormArgs args{in.memory.data(), from,          out.memory.data(), to,   s.batch,      s.channels, s.positions,
                nullptr,          w.parameter(), shift.parameter(), kEps, per_position, pool(1)};
  if (!per_position) args.moments = BlockCall::moments_of(moments);
  report.add(text, kernels.norm(args) ? " no memory" : "");
  const auto bits = out.bits();
  args.pool = pool(3);
  report.add(text, kernels.norm(args) ? " no memory" : "");
  report.add(text, out.bits() == bits ? "" : " other bits with other threads");
  report.add(text, out.memory.pattern_is_whole() ? "" : " memory before a tensor was written to");
  // Eager computes in the dtype of x; the result is then rounded to that of the result.
  Values eager = norm(Eager{from}, x, s, weight, bias, kEps, per_position);
  for (double& value : eager) value = rounded(value, to);
  const Values golden = norm(Golden{}, x, s, weight, bias, kEps, per_position);
  report.add(text, ratios(out.get(), eager, golden, s), to);
}

inline void check_head(const Kernels& kernels, Shape s, int64_t classes, DType dtype, bool per_position,
                       Report& report) {
  char text[120];
  std::snprintf(text, sizeof(text), "head %s, [%d, %d, %d], %d classes, %s", name_of(dtype), static_cast<int>(s.batch),
                static_cast<int>(s.channels), static_cast<int>(s.positions), static_cast<int>(classes),
                per_position ? "LN" : "GN");
  report.begin(text);
  const Shape scores{s.batch, classes, 1};
  Values ours, eager, golden;
  constexpr int kDraws = 6;
  for (int i = 0; i < kDraws; ++i) {
    Draw draw{static_cast<uint64_t>(200 + i)};
    HeadValues v;
    v.x = draw.normals(s.count(), 1, 0.3, dtype);
    v.norm_weight = draw.normals(s.channels, 0.25, 1, dtype);
    v.norm_bias = draw.normals(s.channels, 0.25, 0, dtype);
    v.fc_weight = draw.normals(classes * s.channels, 1 / std::sqrt(static_cast<double>(s.channels)), 0, dtype);
    v.fc_bias = draw.normals(classes, 0.25, 0, dtype);
    const Tensor x(dtype, v.x), weight(dtype, v.norm_weight), bias(dtype, v.norm_bias), fc(dtype, v.fc_weight),
        fc_bias(dtype, v.fc_bias), moments(DType::f32, 2 * s.batch * s.channels), out(dtype, scores.count());
    const MomentsArgs of_x{x.memory.data(), dtype, s.batch, s.channels, s.positions, BlockCall::moments_of(moments),
                           pool(1)};
    report.add(text, kernels.moments(of_x) ? " no memory" : "");
    HeadArgs args{x.memory.data(),
                  dtype,
                  s.batch,
                  s.channels,
                  s.positions,
                  classes,
                  nullptr,
                  weight.parameter(),
                  bias.parameter(),
                  kEps,
                  fc.parameter(),
                  fc_bias.parameter(),
                  per_position,
                  out.memory.data(),
                  dtype,
                  pool(1)};
    if (!per_position) args.moments = BlockCall::moments_of(moments);
    report.add(text, kernels.head(args) ? " no memory" : "");
    const auto bits = out.bits();
    args.pool = pool(3);
    report.add(text, kernels.head(args) ? " no memory" : "");
    report.add(text, out.bits() == bits ? "" : " other bits with other threads");
    report.add(text, out.memory.pattern_is_whole() ? "" : " memory before a tensor was written to");
    const auto append = [](Values& all, const Values& more) { all.insert(all.end(), more.begin(), more.end()); };
    append(ours, Tensor(DType::f32, out.get()).get());
    append(eager, head(Eager{dtype}, v, s, classes, kEps, per_position));
    append(golden, head(Golden{}, v, s, classes, kEps, per_position));
  }
  report.add(text, ratios(ours, eager, golden, {s.batch * kDraws, classes, 1}), dtype);
}

// Every conversion to the bit, through a norm that is the identity: mean 0 and centred squares for a standard deviation
// of 1. `flushes`: whether the set's conversion to bfloat16 takes subnormal numbers to zero.
inline void check_conversions(const Kernels& kernels, DType from, DType to, bool flushes, Report& report) {
  const std::string text = std::string("conversion of ") + name_of(from) + " to " + name_of(to);
  report.begin(text);
  // All values of 16 bits; of float32 those with 16 leading bits and, behind them, what decides the rounding.
  constexpr uint32_t kTails[] = {0, 1, 0x0fff, 0x1000, 0x1001, 0x2fff, 0x3000, 0x7fff, 0x8000, 0x8001, 0xffff};
  const int64_t tails = from == DType::f32 ? 11 : 1, count = 65536 * tails;
  const Tensor in(from, count), out(to, count), moments(DType::f32, 2), one(DType::f32, Values{1.}),
      zero(DType::f32, Values{0.});
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(i / tails) << 16 | kTails[i % tails];
    const uint16_t half = static_cast<uint16_t>(i);
    if (from == DType::f32)
      std::memcpy(in.memory.data() + 4 * i, &bits, 4);
    else
      std::memcpy(in.memory.data() + 2 * i, &half, 2);
  }
  moments.set({0., static_cast<double>(count)});
  // Spans of odd lengths, so that partial vectors are converted as well.
  for (int64_t first = 0, length = 1; first < count; first += length, length = length % 13 == 12 ? 4096 : length + 1) {
    length = std::min(length, count - first);
    moments.set({0., static_cast<double>(length)});
    NormArgs args{in.memory.data() + first * riformer::size_of(from),
                  from,
                  out.memory.data() + first * riformer::size_of(to),
                  to,
                  1,
                  1,
                  length,
                  BlockCall::moments_of(moments),
                  one.parameter(),
                  zero.parameter(),
                  0.,
                  false,
                  pool(1)};
    report.add(text, kernels.norm(args) ? " no memory" : "");
  }
  const Values given = in.get(), found = out.get();
  int wrong = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double value = given[static_cast<size_t>(i)], expected = rounded(value, to),
                 got = found[static_cast<size_t>(i)];
    const bool flushed = flushes && to == DType::bf16 && std::fabs(value) < 0x1p-126 && got == 0;
    wrong += !(got == expected || (std::isnan(got) && std::isnan(expected)) || flushed);
  }
  report.add(text, wrong ? " " + std::to_string(wrong) + " values are wrong" : "");
}

}  // namespace kernel_check
