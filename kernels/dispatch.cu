// A dispatch by itself; see dispatch.cuh.
#include "dispatch.cuh"
#include "load.cuh"

namespace ultraep {

constexpr size_t kDispatchStatic = 2048; // shared memory that the kernel declares, at most

template <bool kBulk>
__global__ void __launch_bounds__(kMaxDispatchWarps *kWarp, 1)
    dispatchKernel(const __grid_constant__ kernelGroup_t g, const __grid_constant__ kernelRoute_t route,
                   const __grid_constant__ kernelExchange_t x, const DispatchShape shape) {
  extern __shared__ __align__(128) char dispatchMemory[];
  __shared__ uint64_t barriers[kMaxDispatchWarps * kBuffers];
  if (routeRefuses(g, route)) return; // alike on every rank
  uint32_t call = callOf(g);
  DispatchMemory memory(dispatchMemory, g, shape);
  memory.fillTable(g, x);
  int other, warp = int(threadIdx.x) / kWarp;
  bool alive = openExchange(g, x.check, call, KERNEL_PHASE_DISPATCH, &other);
  DispatchContext c{g, route, x, shape, memory.bases};
  DispatchTokens tokens = {int(blockIdx.x) * shape.nWarps + warp, x.nTokens, int(gridDim.x) * shape.nWarps};
  alive = dispatchRun<kBulk>(c, memory, barriers, tokens, call, alive);
  // ONCE has raised DONE before it spread.
  closeExchange(g, route, x.check, call, KERNEL_PHASE_DISPATCH, alive && !x.once, other);
}

cudaError_t loadDispatchKernels() {
  return loadKernels({kernelAddress(dispatchKernel<true>), kernelAddress(dispatchKernel<false>)});
}

} // namespace ultraep

int kernelDispatchLaunch(const kernelGroup_t *group, const kernelRoute_t *route,
                         const kernelExchange_t *exchange, cudaStream_t stream) {
  using namespace ultraep;
  size_t bytes;
  DispatchShape shape = dispatchShape(*group, *exchange, kDispatchStatic, &bytes);
  auto kernel = group->hasBulk ? dispatchKernel<true> : dispatchKernel<false>;
  int nBlocks = dispatchBlocks(*group, *exchange), nThreads = shape.nWarps * kWarp;
  return launchKernel(kernel, {nBlocks, nThreads, bytes, stream}, *group, *route, *exchange, shape);
}
