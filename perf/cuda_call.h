/* Calls of the CUDA runtime that may fail, for the tools. */
#ifndef ULTRAEP_PERF_CUDA_CALL_H_
#define ULTRAEP_PERF_CUDA_CALL_H_

#include "options.h"

#include <cuda_runtime_api.h>
#include <string.h>

/* Leaves the function with -1 and a message that names the call where it fails. */
#define PERF_CUDA(error, call)                                                                               \
  do {                                                                                                       \
    cudaError_t cudaResult = (call);                                                                         \
    if (cudaResult != cudaSuccess)                                                                           \
      return perfErrorSet(error, "%.*s: %s", (int)strcspn(#call, "("), #call,                                \
                          cudaGetErrorString(cudaResult));                                                   \
  } while (0)

#endif
