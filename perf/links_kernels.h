/* The GPU code of ultraep_links. All are enqueued on the stream, on the current device. */
#ifndef ULTRAEP_PERF_LINKS_KERNELS_H_
#define ULTRAEP_PERF_LINKS_KERNELS_H_

#include <cuda_runtime_api.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A kernel's first call loads it, which may wait for all that runs on the GPU: so before two GPUs meet. */
cudaError_t linksKernelsLoad(void);

/* bytes, a multiple of 16, by so many blocks. Either place may be another GPU's. */
cudaError_t linksKernelCopy(void *to, const void *from, int64_t bytes, int32_t blocks, cudaStream_t stream);

/* What one side of the flags has seen. */
typedef struct {
  uint64_t ns;     /* of all timed round trips */
  uint64_t failed; /* 1: the other side did not answer within LINKS_FLAG_SECONDS */
} linksFlagResult_t;

enum { LINKS_FLAG_SECONDS = 5, LINKS_FLAG_UNTIMED = 10 };

/* Enqueue on both GPUs: mine is the word here that the other side counts up, theirs the other's; both 0. Of
 * two sides one begins. After a few untimed round trips, `trips` that are timed. */
cudaError_t linksKernelFlags(uint64_t *mine, uint64_t *theirs, int32_t trips, int begins,
                             linksFlagResult_t *result, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
