/* The GPU code of ultraep_links. All are enqueued on the stream, on the current device. */
#ifndef ULTRAEP_PERF_LINKS_KERNELS_H_
#define ULTRAEP_PERF_LINKS_KERNELS_H_

#include <cuda_runtime_api.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { LINKS_WAIT_SECONDS = 5, LINKS_FLAG_UNTIMED = 10 };

/* A kernel's first call loads it, which may wait for all that runs on the GPU: so before two GPUs meet.
 * nStages: of a block's bulk copies; 0: the device has none (before sm_90). */
cudaError_t linksKernelsLoad(int32_t *nStages);

/* bytes, a multiple of 16, by so many blocks. Either place may be another GPU's. */
cudaError_t linksKernelCopy(void *to, const void *from, int64_t bytes, int32_t blocks, cudaStream_t stream);
/* By bulk copies into shared memory and from there, nStages of them under way in a block. Gives up, with part
 * of it not copied, where one takes LINKS_WAIT_SECONDS. */
cudaError_t linksKernelCopyBulk(void *to, const void *from, int64_t bytes, int32_t blocks, int32_t nStages,
                                cudaStream_t stream);

/* A pattern that differs by seed and position; how many pieces of 16 bytes are not as it says, added to
 * nWrong. */
cudaError_t linksKernelFill(void *to, int64_t bytes, int32_t seed, int32_t blocks, cudaStream_t stream);
cudaError_t linksKernelCheck(const void *at, int64_t bytes, int32_t seed, int32_t blocks,
                             unsigned long long *nWrong, cudaStream_t stream);

/* What one side of the flags has seen. */
typedef struct {
  uint64_t ns;     /* of all timed round trips */
  uint64_t failed; /* 1: the other side did not answer within LINKS_WAIT_SECONDS */
} linksFlagResult_t;

/* Enqueue on both GPUs: mine is the word here that the other side counts up, theirs the other's; both 0. Of
 * two sides one begins. After a few untimed round trips, `trips` that are timed. */
cudaError_t linksKernelFlags(uint64_t *mine, uint64_t *theirs, int32_t trips, int begins,
                             linksFlagResult_t *result, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
