/* cuBLAS, loaded at run time: the tool builds with its headers alone and starts where it is not. */
#ifndef ULTRAEP_PERF_MOE_CUBLAS_H_
#define ULTRAEP_PERF_MOE_CUBLAS_H_

#include "options.h"

#include <cublas_v2.h>

typedef struct {
  __typeof__(cublasCreate) *Create;
  __typeof__(cublasDestroy) *Destroy;
  __typeof__(cublasSetStream) *SetStream;
  __typeof__(cublasSetWorkspace) *SetWorkspace;
  __typeof__(cublasSetSmCountTarget) *SetSmCountTarget;
  __typeof__(cublasGemmEx) *GemmEx;
  __typeof__(cublasGemmGroupedBatchedEx) *GemmGroupedBatchedEx;
  __typeof__(cublasGetStatusString) *GetStatusString;
} moeCublas_t;

/* Loads it, once for all threads, and keeps it. Says what is missing. */
int moeCublasOpen(const moeCublas_t **cublas, perfError_t *error);

#endif
