// A route by itself; see route.cuh.
#include "load.cuh"
#include "route.cuh"

namespace ultraep {

__global__ void __launch_bounds__(kRouteThreads, 1)
    routeKernel(const __grid_constant__ kernelGroup_t g, const __grid_constant__ kernelRoute_t route,
                const __grid_constant__ kernelUpdate_t update, RouteShape shape) {
  __shared__ PlanShared shared;
  uint32_t call = callOf(g);
  RouteOutcome out = routeRun(g, route, update, shape, shared, call);
  if (!lastBlockOut(g)) return;
  int ignored;
  if (g.usesMeta == 2 && out.alive && out.status.code == kSuccess) {
    raiseFlags(g, KERNEL_FLAG_META, call, 0);
    waitFlags(g, KERNEL_FLAG_META, call, KERNEL_PHASE_ROUTE, 0, &ignored);
  }
  if (threadIdx.x == 0) routeConclude(g, route, update, out.status, call);
}

cudaError_t loadRouteKernels() {
  return loadKernels({kernelAddress(routeKernel)});
}

} // namespace ultraep

size_t kernelRouteSharedBytes(const kernelPlanner_t *p) {
  // One counting warp, and room for what kernels declare statically.
  return ultraep::RouteShared::fixedBytes(p->nRanks, p->nExperts, p->nSlots) + 16 +
         sizeof(uint32_t) * p->nExperts + ultraep::kStaticShared;
}

int kernelRouteLaunch(const kernelGroup_t *group, const kernelRoute_t *route, const kernelUpdate_t *update,
                      cudaStream_t stream) {
  using namespace ultraep;
  if (kernelRouteSharedBytes(&group->planner) > size_t(group->sharedBytes))
    return cudaErrorInvalidConfiguration;
  int nBlocks;
  size_t bytes;
  RouteShape shape = routeShape(*group, update->nTokens, &nBlocks, &bytes);
  return launchKernel(routeKernel, {nBlocks, kRouteThreads, bytes, stream}, *group, *route, *update, shape);
}
