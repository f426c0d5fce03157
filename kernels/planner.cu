// The planner alone, for tools and tests; a route plans inside its own kernel.
#include "load.cuh"
#include "planner.cuh"

namespace ultraep {

constexpr int kPlanThreads = 512;
constexpr size_t kPlanStatic = 2048; // shared memory that the kernel declares, at most

__global__ void __launch_bounds__(kPlanThreads, 1)
    planKernel(const kernelPlanner_t p, const int32_t *__restrict__ loads, kernelPlan_t plan,
               const PlanCopies copies) {
  __shared__ PlanShared shared;
  PlanArrays a;
  a.carve(p.nRanks, p.nExperts, p.nSlots);
  planBlock(p, a, shared, loads, copies);
  for (int i = threadIdx.x; i < p.nRanks * p.nSlots; i += blockDim.x) {
    plan.slotExpert[i] = a.slotExpert[i];
    plan.slotQuota[i] = a.slotQuota[i];
  }
  for (int e = threadIdx.x; e < p.nExperts; e += blockDim.x) plan.masterQuota[e] = a.rem[e];
  if (threadIdx.x == 0) {
    plan.summary[KERNEL_SUMMARY_MAX_PLANNED] = shared.all.most;
    plan.summary[KERNEL_SUMMARY_REPLICAS] = shared.all.nReplicas;
    plan.summary[KERNEL_SUMMARY_TARGET] = shared.all.target;
  }
}

} // namespace ultraep

int kernelPlanLaunch(const kernelPlanner_t *planner, const int32_t *loads, kernelPlan_t plan,
                     cudaStream_t stream) {
  using namespace ultraep;
  size_t bytes = PlanArrays::bytes(planner->nRanks, planner->nExperts, planner->nSlots);
  int device, limit;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  PlanCopies copies(*planner, bytes, size_t(limit) - kPlanStatic, kPlanThreads / kWarp);
  bytes = copies.end(bytes);
  error = cudaFuncSetAttribute(kernelAddress(planKernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(bytes));
  if (error != cudaSuccess) return error;
  return launchKernel(planKernel, {1, kPlanThreads, bytes, stream}, *planner, loads, plan, copies);
}

int kernelsLoad(void) {
  cudaError_t error = ultraep::loadRouteKernels();
  if (error == cudaSuccess) error = ultraep::loadDispatchKernels();
  if (error == cudaSuccess) error = ultraep::loadRouteDispatchKernels();
  if (error == cudaSuccess) error = ultraep::loadCombineKernels();
  if (error == cudaSuccess) error = ultraep::loadWeightsKernels();
  if (error == cudaSuccess) error = ultraep::loadGradsKernels();
  return error;
}
