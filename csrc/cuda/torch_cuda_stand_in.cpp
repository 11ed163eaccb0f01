// Stands in for libtorch_cuda.so while the CUDA library is linked; never installed, and never called.
#include <cstdint>

extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t, void**) { return 1; }
