// Copies by a kernel, between device and page-locked memory: unlike the copy engines' queues, which streams
// share, a stream's own order is all that it waits for.
#include "gpu_copy.h"
#include "launch.cuh"

static __global__ void copyKernel(unsigned char *to, const unsigned char *from, size_t bytes) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < bytes;
       i += size_t(gridDim.x) * blockDim.x)
    to[i] = from[i];
}

int gpu_copy_load(void) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, ultraep::kernelAddress(copyKernel));
}

int gpu_copy(void *to, const void *from, size_t bytes, cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  return ultraep::launchKernel(copyKernel, {4, 256, 0, stream}, static_cast<unsigned char *>(to),
                               static_cast<const unsigned char *>(from), bytes);
}
