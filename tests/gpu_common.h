/* Shared by the tests that need a GPU: skip without one, and device buffers that check themselves. */
#ifndef ULTRAEP_TESTS_GPU_COMMON_H_
#define ULTRAEP_TESTS_GPU_COMMON_H_

#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>

/* How much longer than on a GPU things may take: an emulated one is slow. */
#ifndef GPU_PATIENCE
#define GPU_PATIENCE 1
#endif

#define GPU_SKIP_CODE 77 /* ctest's SKIP_RETURN_CODE */

/* For main: leaves with "skipped" where no device can be used. */
#define GPU_REQUIRE()                                                                                        \
  do {                                                                                                       \
    int gpuCount = 0;                                                                                        \
    if (cudaGetDeviceCount(&gpuCount) != cudaSuccess || gpuCount == 0) {                                     \
      printf("no CUDA device: skipped\n");                                                                   \
      return GPU_SKIP_CODE;                                                                                  \
    }                                                                                                        \
  } while (0)

#define GPU_OK(call)                                                                                         \
  do {                                                                                                       \
    cudaError_t gpuError = (call);                                                                           \
    if (gpuError != cudaSuccess) fail_msg("%s: %s", #call, cudaGetErrorString(gpuError));                    \
  } while (0)

/* For main, before anything asks for devices or loads NCCL: several ranks on one GPU. The caller's own
 * settings stand. threads: of one process, whose streams all run by themselves, for which CUDA looks when it
 * starts. */
static inline void gpu_share(int threads) {
  setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1", 0);
  setenv("NCCL_MAX_CTAS", "4", 0);
  setenv("NCCL_NVLS_ENABLE", "0", 0);
  if (threads) setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
}

#endif
