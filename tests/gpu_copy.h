#ifndef ULTRAEP_TESTS_GPU_COPY_H_
#define ULTRAEP_TESTS_GPU_COPY_H_

#include <cuda_runtime_api.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Both give a cudaError_t as int. To be loaded before any kernel waits: a first launch would load it, and may
 * wait for the whole device. */
int gpu_copy_load(void);
int gpu_copy(void *to, const void *from, size_t bytes, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
