// The launchers of kernels.h, all but `block`.
#include "convert.h"
#include "embed.h"
#include "head.h"
#include "moments.h"
#include "norm.h"

namespace riformer::cuda {

int64_t moments_workspace(const MomentsArgs& args) {
  return moments_partials_count(args.batch, args.positions, args.channels) * 4;
}
void moments(const MomentsArgs& args) {
  launch_moments(args.x, args.dtype, args.batch, args.positions, args.channels, args.moments,
                 static_cast<float*>(args.workspace), args.device);
}

int64_t embed_workspace(const EmbedArgs& args) { return embed_plan(args).workspace(); }
void embed(const EmbedArgs& args) { launch_embed(args); }

void norm(const NormArgs& args) { launch_norm(args); }

int64_t head_workspace(const HeadArgs& args) { return pool_sums_count(args) * 4; }
void head(const HeadArgs& args) { launch_head(args); }

void convert(const Device& device, const void* from, DType from_dtype, void* to, DType to_dtype, int64_t count) {
  launch_convert(device, from, from_dtype, to, to_dtype, count);
}

}  // namespace riformer::cuda
