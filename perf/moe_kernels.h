/* The GPU code of ultraep_moe: what is between the products. Rows hold a multiple of 16 elements; bfloat16 is
 * kept as uint16_t. All are enqueued on the stream, and leave nothing to be loaded later once moeKernelsLoad
 * was called. */
#ifndef ULTRAEP_PERF_MOE_KERNELS_H_
#define ULTRAEP_PERF_MOE_KERNELS_H_

#include <cuda_runtime_api.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A kernel's first call loads it, which may wait for all that runs on the GPU: so before ranks meet. */
cudaError_t moeKernelsLoad(void);

/* to[count] = moeValue * scale. */
cudaError_t moeKernelFill(uint16_t *to, int64_t count, uint64_t seed, float scale, cudaStream_t stream);
/* rows[count][hidden]: row r times weights[r]. */
cudaError_t moeKernelScale(uint16_t *rows, const float *weights, int64_t count, int64_t hidden,
                           cudaStream_t stream);
/* act[count][inter] from gateUp[count][2 * inter]. */
cudaError_t moeKernelSwiglu(const uint16_t *gateUp, uint16_t *act, int64_t count, int64_t inter,
                            cudaStream_t stream);
/* gateUp becomes its gradient. */
cudaError_t moeKernelSwigluBack(uint16_t *gateUp, const uint16_t *actGrad, int64_t count, int64_t inter,
                                cudaStream_t stream);

/* Arrays of 32-bit words, copied one behind the other by a kernel: copies by the copy engines could wait
 * behind other ranks' kernels. A null array is copied as zeros. */
enum { MOE_KERNEL_ARRAYS = 8 };
typedef struct {
  int32_t nArrays;
  int32_t counts[MOE_KERNEL_ARRAYS];
  const void *arrays[MOE_KERNEL_ARRAYS];
} moeKernelArrays_t;
cudaError_t moeKernelGather(const moeKernelArrays_t *from, void *to, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
