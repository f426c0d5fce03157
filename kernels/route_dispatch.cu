// An update of a route and the dispatch on it in one launch. The ranks meet once less: a rank whose counts
// have come is in the call, so its rows may be written. A block places its own tokens and moves them, without
// a barrier of the grid between.
#include "dispatch.cuh"
#include "load.cuh"
#include "route.cuh"

namespace ultraep {

static_assert(kRouteThreads == kMaxDispatchWarps * kWarp, "one block for both parts");
constexpr size_t kRouteDispatchStatic = 2816; // shared memory that the kernel declares, at most

template <bool kBulk>
__global__ void __launch_bounds__(kRouteThreads, 1)
    routeDispatchKernel(const __grid_constant__ kernelGroup_t g, const __grid_constant__ kernelRoute_t route,
                        const __grid_constant__ kernelUpdate_t update,
                        const __grid_constant__ kernelExchange_t x, RouteShape routeShape,
                        const DispatchShape shape) {
  __shared__ PlanShared shared;
  __shared__ uint64_t barriers[kMaxDispatchWarps * kBuffers];
  uint32_t call = callOf(g);
  RouteOutcome out = routeRun(g, route, update, routeShape, shared, call);
  bool alive = out.alive && out.status.code == kSuccess;
  // The plan's memory becomes the rows' buffers.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if constexpr (kBulk) bulkFenceShared();
#endif
  __syncthreads();
  DispatchMemory memory(planMemory, g, shape);
  memory.fillTable(g, x);
  __syncthreads();
  DispatchContext c{g, route, x, shape, memory.bases};
  BlockTokens mine(x.nTokens);
  DispatchTokens tokens = {mine.from + int(threadIdx.x) / kWarp, mine.to, shape.nWarps};
  alive = dispatchRun<kBulk>(c, memory, barriers, tokens, call, alive);
  if (!lastBlockOut(g)) return;
  int ignored;
  if (alive && !x.once && !hasFailed(g)) { // ONCE has raised DONE before it spread
    raiseFlags(g, doneKind(g), call, x.check);
    waitFlags(g, doneKind(g), call, KERNEL_PHASE_DISPATCH, x.check, &ignored);
  }
  if (threadIdx.x == 0) routeConclude(g, route, update, out.status, call);
}

cudaError_t loadRouteDispatchKernels() {
  return loadKernels({kernelAddress(routeDispatchKernel<true>), kernelAddress(routeDispatchKernel<false>)});
}

} // namespace ultraep

int kernelRouteDispatchLaunch(const kernelGroup_t *group, const kernelRoute_t *route,
                              const kernelUpdate_t *update, const kernelExchange_t *exchange,
                              cudaStream_t stream) {
  using namespace ultraep;
  if (kernelRouteSharedBytes(&group->planner) > size_t(group->sharedBytes))
    return cudaErrorInvalidConfiguration;
  int nBlocks = dispatchBlocks(*group, *exchange), ignored;
  size_t routeBytes, rowBytes;
  RouteShape route1 = routeShape(*group, update->nTokens, &ignored, &routeBytes);
  DispatchShape shape = dispatchShape(*group, *exchange, kRouteDispatchStatic, &rowBytes);
  auto kernel = group->hasBulk ? routeDispatchKernel<true> : routeDispatchKernel<false>;
  return launchKernel(kernel, {nBlocks, kRouteThreads, std::max(routeBytes, rowBytes), stream}, *group,
                      *route, *update, *exchange, route1, shape);
}
