// Launching a kernel: its arguments have its parameters' types.
#ifndef ULTRAEP_LAUNCH_CUH_
#define ULTRAEP_LAUNCH_CUH_

#include "kernel_address.cuh"

namespace ultraep {

struct Launch {
  int nBlocks, nThreads;
  size_t sharedBytes; // beyond what the kernel declares
  cudaStream_t stream;
  bool overlaps = false; // its blocks may be put on SMs before the kernel before is over, if that lets them
};

// The kernel says what the types are; the arguments follow.
template <typename T> struct Given { using Type = T; };

template <typename... Parameters>
cudaError_t launchKernel(void (*kernel)(Parameters...), const Launch &launch,
                         const typename Given<Parameters>::Type &...arguments) {
  void *addresses[] = {const_cast<void *>(static_cast<const void *>(&arguments))...};
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {
      dim3(launch.nBlocks),     dim3(launch.nThreads), launch.sharedBytes, launch.stream, &overlap,
      launch.overlaps ? 1u : 0u};
  return cudaLaunchKernelExC(&config, kernelAddress(kernel), addresses);
}

} // namespace ultraep

#endif
