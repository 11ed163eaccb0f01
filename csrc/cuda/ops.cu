// The ops of kernels.h but for `block`.
#include "embed.h"
#include "moments.h"

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

}  // namespace riformer::cuda
