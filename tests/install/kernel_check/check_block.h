// The checks of `block` and `moments`.
#pragma once

#include <memory>

#include "report.h"

namespace kernel_check {

using riformer::cpu::BlockArgs;
using riformer::cpu::Kernels;
using riformer::cpu::MomentsArgs;

constexpr double kEps = 1e-5;

struct BlockCase {
  int64_t channels, hidden, positions, batch;
  DType dtype;
  bool per_position, residual;
  char form;  // 't'raining, 'd'eployed, or the 'u'nit: no first half
  DType parameters;
  double spread = 1, mean = 0;  // of x
  bool biases = true;           // and the second layer scale

  Shape shape() const { return {batch, channels, positions}; }
  std::string text() const {
    char line[160];
    std::snprintf(line, sizeof(line), "block %s, parameters %s, [%d, %d, %d], hidden %d, %s %c%s%s, x %g +- %g",
                  name_of(dtype), name_of(parameters), static_cast<int>(batch), static_cast<int>(channels),
                  static_cast<int>(positions), static_cast<int>(hidden), per_position ? "LN" : "GN", form,
                  residual ? "" : ", no residual", biases ? "" : ", no biases", mean, spread);
    return line;
  }
};

// Hard parameters: nothing at its neutral value, layer scales of about a half.
inline BlockValues draw_block(const BlockCase& c, uint64_t seed) {
  Draw draw{seed};
  const auto vector = [&](double spread, double mean) { return draw.normals(c.channels, spread, mean, c.parameters); };
  BlockValues v;
  v.x = draw.normals(c.shape().count(), c.spread, c.mean, DType::f32);
  const Values offset = draw.normals(c.channels, c.spread / 2, 0, DType::f32);
  for (size_t i = 0; i < v.x.size(); ++i)
    v.x[i] = rounded(v.x[i] + offset[i / static_cast<size_t>(c.positions) % offset.size()], c.dtype);
  if (c.form != 'u') {
    v.layer_scale_1 = vector(0.3, 0.5);
    v.norm1_weight = c.form == 't' ? vector(0.25, 1) : vector(0.5, 0);
    v.norm1_bias = vector(0.25, 0);
  }
  if (c.form == 't') {
    v.affine_weight = vector(0.5, 1);
    v.affine_bias = vector(0.25, 0);
  }
  v.norm2_weight = vector(0.25, 1);
  v.norm2_bias = vector(0.25, 0);
  const double width = static_cast<double>(c.channels), inner = static_cast<double>(c.hidden);
  v.fc1_weight = draw.normals(c.hidden * c.channels, 1 / std::sqrt(width), 0, c.parameters);
  v.fc2_weight = draw.normals(c.hidden * c.channels, 1.5 / std::sqrt(inner), 0, c.parameters);
  const double bias = c.biases ? 1 : 0;
  v.fc1_bias = draw.normals(c.hidden, 0.5 * bias, 0, c.parameters);
  v.fc2_bias = vector(0.25 * bias, 0);
  v.layer_scale_2 = vector(0.3 * bias, c.biases ? 0.5 : 1);
  return v;
}

// One call: its tensors in guarded memory.
struct BlockCall {
  BlockCase given;
  Tensor x, out, moments, out_moments;
  std::vector<std::unique_ptr<Tensor>> parameters;
  BlockArgs args{};

  BlockCall(const BlockCase& c, const BlockValues& v)
      : given(c),
        x(c.dtype, v.x),
        out(c.dtype, c.shape().count()),
        moments(DType::f32, c.batch * 2 * c.channels),
        out_moments(DType::f32, c.batch * 2 * c.channels) {
    args.x = x.memory.data();
    args.out = out.memory.data();
    args.dtype = c.dtype;
    args.batch = c.batch;
    args.channels = c.channels;
    args.positions = c.positions;
    args.hidden = c.hidden;
    args.eps1 = args.eps2 = kEps;
    args.per_position = c.per_position;
    args.residual = c.residual;
    const auto keep = [&](const Values& values) -> riformer::cpu::Parameter {
      if (values.empty()) return {};
      parameters.push_back(std::make_unique<Tensor>(c.parameters, values));
      return parameters.back()->parameter();
    };
    args.layer_scale_1 = keep(v.layer_scale_1);
    args.norm1_weight = keep(v.norm1_weight);
    args.norm1_bias = keep(v.norm1_bias);
    args.affine_weight = keep(v.affine_weight);
    args.affine_bias = keep(v.affine_bias);
    args.norm2_weight = keep(v.norm2_weight);
    args.norm2_bias = keep(v.norm2_bias);
    args.fc1_weight = keep(v.fc1_weight);
    args.fc2_weight = keep(v.fc2_weight);
    if (c.biases) {
      args.fc1_bias = keep(v.fc1_bias);
      args.fc2_bias = keep(v.fc2_bias);
      args.layer_scale_2 = keep(v.layer_scale_2);
    }
  }

  // Empty, or what is wrong about where it wrote.
  std::string run(const Kernels& kernels, int64_t threads, bool in_place = false) {
    const auto before = x.bits();
    if (!given.per_position) {
      MomentsArgs of_x{x.memory.data(), given.dtype,         given.batch,  given.channels,
                       given.positions, moments_of(moments), pool(threads)};
      if (kernels.moments(of_x)) return " moments had no memory";
      args.moments = moments_of(moments);
      args.moments_out = moments_of(in_place ? moments : out_moments);
    }
    args.out = in_place ? x.memory.data() : out.memory.data();
    args.pool = pool(threads);
    if (kernels.block(args)) return " block had no memory";
    if (!in_place && x.bits() != before) return " x was written to";
    for (const Tensor* tensor : {&x, &out, &moments, &out_moments})
      if (!tensor->memory.pattern_is_whole()) return " memory before a tensor was written to";
    return "";
  }
  static float* moments_of(const Tensor& tensor) { return reinterpret_cast<float*>(tensor.memory.data()); }
};

// How many draws of a case: few values make the ratios noisy.
inline int draws_of(int64_t values) {
  return static_cast<int>(values >= 6000 ? 1 : std::min<int64_t>(24, 6000 / values + 1));
}

inline void check_block(const Kernels& kernels, const BlockCase& c, Report& report) {
  report.begin(c.text());
  Values ours, eager, golden;
  const int draws = draws_of(c.shape().count());
  for (int draw = 0; draw < draws; ++draw) {
    const BlockValues v = draw_block(c, static_cast<uint64_t>(1 + draw));
    BlockCall call(c, v);
    const std::string wrong = call.run(kernels, 1);
    report.add(c.text(), wrong);
    if (!wrong.empty()) return;
    const Values out = call.out.get();
    if (!c.per_position) {
      report.add(c.text(), wrong_moments(call.moments.get(), v.x, c.shape()));
      report.add(c.text(), wrong_moments(call.out_moments.get(), out, c.shape()));
    }
    const auto append = [](Values& to, const Values& more) { to.insert(to.end(), more.begin(), more.end()); };
    append(ours, out);
    append(eager, block(Eager{c.dtype}, v, c.shape(), c.hidden, kEps, c.per_position, c.residual));
    append(golden, block(Golden{}, v, c.shape(), c.hidden, kEps, c.per_position, c.residual));
  }
  const Shape all{c.batch * draws, c.channels, c.positions};
  report.add(c.text(), ratios(ours, eager, golden, all), c.dtype);
}

// The same bits with any number of threads (and so with channels shared out or not), in place, alone and in a batch;
// a NaN stays in its image.
inline void check_block_promises(const Kernels& kernels, const BlockCase& c, Report& report) {
  report.begin(c.text());
  const BlockValues v = draw_block(c, 7);
  BlockCall whole(c, v);
  report.add(c.text(), whole.run(kernels, 1));
  const auto expected = whole.out.bits(), expected_moments = whole.out_moments.bits();
  for (const int64_t threads : {2, 3, 8}) {
    BlockCall again(c, v);
    report.add(c.text(), again.run(kernels, threads));
    report.add(c.text(), again.out.bits() == expected ? "" : " other bits with other threads");
    if (!c.per_position)
      report.add(c.text(), again.out_moments.bits() == expected_moments ? "" : " other moments with other threads");
  }
  BlockCall over(c, v);
  report.add(c.text(), over.run(kernels, 1, true));
  report.add(c.text(), over.x.bits() == expected ? "" : " other bits in place");
  const int64_t size = c.channels * c.positions;
  for (int64_t image = 0; image < c.batch; ++image) {
    BlockCase one = c;
    one.batch = 1;
    BlockValues alone = v;
    alone.x.assign(v.x.begin() + image * size, v.x.begin() + (image + 1) * size);
    BlockCall call(one, alone);
    report.add(one.text(), call.run(kernels, 1));
    const auto bits = call.out.bits();
    const size_t bytes = bits.size();
    report.add(one.text(), std::equal(bits.begin(), bits.end(), expected.begin() + static_cast<int64_t>(image * bytes))
                               ? ""
                               : " other bits alone than in a batch");
  }
  BlockValues poisoned = v;
  poisoned.x[static_cast<size_t>(size / 2)] = std::nan("");
  BlockCall call(c, poisoned);
  report.add(c.text(), call.run(kernels, 1));
  const auto bits = call.out.bits();
  const auto first = static_cast<int64_t>(bits.size()) / c.batch;
  report.add(c.text(), std::equal(bits.begin() + first, bits.end(), expected.begin() + first) ? "" : " a NaN spread");
  const Values out = call.out.get();
  bool lost = true;
  for (int64_t ch = 0; ch < c.channels; ++ch)
    lost = lost && !std::isnan(out[static_cast<size_t>(ch * c.positions + size / 2 % c.positions)]);
  report.add(c.text(), lost ? " a NaN was lost" : "");
}

}  // namespace kernel_check
