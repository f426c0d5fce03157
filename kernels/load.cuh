// Each file of kernels loads its own; kernelsLoad calls them all.
#ifndef ULTRAEP_LOAD_CUH_
#define ULTRAEP_LOAD_CUH_

#include "launch.cuh"

#include <initializer_list>

namespace ultraep {

cudaError_t loadRouteKernels();
cudaError_t loadDispatchKernels();
cudaError_t loadRouteDispatchKernels();
cudaError_t loadCombineKernels();
cudaError_t loadWeightsKernels();
cudaError_t loadGradsKernels();

// Loads the kernels and lets them use all the shared memory that a block can have.
inline cudaError_t loadKernels(std::initializer_list<const void *> kernels) {
  int device, limit;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  for (const void *kernel : kernels) {
    cudaFuncAttributes attributes;
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   limit - int(attributes.sharedSizeBytes));
  }
  return error;
}

} // namespace ultraep

#endif
