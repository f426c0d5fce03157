/* NCCL, loaded at run time: the tools build without it and run where it is not. Types are NCCL's by ABI
 * (nccl.h). */
#ifndef ULTRAEP_PERF_NCCL_LOADER_H_
#define ULTRAEP_PERF_NCCL_LOADER_H_

#include "options.h"
#include "ultraep.h"

typedef struct {
  char bytes[128]; /* passed by value */
} ncclLoaderId_t;

enum { NCCL_LOADER_INT8 = 0 };            /* ncclInt8 */
enum { NCCL_LOADER_MIN_VERSION = 23000 }; /* several ranks on one GPU */

typedef struct {
  int version; /* 23007: 2.30.7 */
  int (*GetUniqueId)(ncclLoaderId_t *id);
  int (*CommInitRank)(ncclComm_t *comm, int nRanks, ncclLoaderId_t id, int rank);
  int (*CommDestroy)(ncclComm_t comm);
  int (*CommAbort)(ncclComm_t comm);
  int (*GroupStart)(void);
  int (*GroupEnd)(void);
  int (*Send)(const void *buffer, size_t count, int type, int peer, ncclComm_t comm, cudaStream_t stream);
  int (*Recv)(void *buffer, size_t count, int type, int peer, ncclComm_t comm, cudaStream_t stream);
  const char *(*GetErrorString)(int result);
} ncclLoader_t;

/* Loads libnccl.so.2, whose environment must be set by now, and keeps it. Says what is missing. */
int ncclLoaderOpen(ncclLoader_t *nccl, perfError_t *error);

#endif
