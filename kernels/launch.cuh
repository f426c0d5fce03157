// Launching a kernel: its arguments have its parameters' types.
#ifndef ULTRAEP_LAUNCH_CUH_
#define ULTRAEP_LAUNCH_CUH_

#include "kernel_address.cuh"

namespace ultraep {

struct Launch {
  int nBlocks, nThreads;
  size_t sharedBytes; // beyond what the kernel declares
  cudaStream_t stream;
};

// The kernel says what the types are; the arguments follow.
template <typename T> struct Given { using Type = T; };

template <typename... Parameters>
cudaError_t launchKernel(void (*kernel)(Parameters...), const Launch &launch,
                         const typename Given<Parameters>::Type &...arguments) {
  void *addresses[] = {const_cast<void *>(static_cast<const void *>(&arguments))...};
  return cudaLaunchKernel(kernelAddress(kernel), dim3(launch.nBlocks), dim3(launch.nThreads), addresses,
                          launch.sharedBytes, launch.stream);
}

} // namespace ultraep

#endif
