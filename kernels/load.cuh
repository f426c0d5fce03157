// Each file of kernels loads its own; kernelsLoad calls them all.
#ifndef ULTRAEP_LOAD_CUH_
#define ULTRAEP_LOAD_CUH_

#include <cuda_runtime.h>
#include <initializer_list>

namespace ultraep {

cudaError_t loadRouteKernels();
cudaError_t loadDispatchKernels();
cudaError_t loadCombineKernels();

inline cudaError_t loadKernels(std::initializer_list<const void *> kernels) {
  cudaFuncAttributes attributes;
  for (const void *kernel : kernels) {
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <typename Kernel> const void *kernelAddress(Kernel *kernel) {
  return reinterpret_cast<const void *>(kernel);
}

} // namespace ultraep

#endif
