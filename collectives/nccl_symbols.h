/* The NCCL functions that the NCCL backend calls, found at run time: libultraep never links libnccl. The
 * types are NCCL's own by ABI (nccl.h, nccl_device.h of NCCL 2.29 and later). The functions are there in
 * every release from 2.19 on, but for those that may be null. */
#ifndef ULTRAEP_NCCL_SYMBOLS_H_
#define ULTRAEP_NCCL_SYMBOLS_H_

#include "ultraep.h"

#include <stdbool.h>

typedef struct ncclWindow_vidmem *ncclWindow_t;

#define NCCL_WINDOW_VERSION 22900  /* whose windows have peers' pointers */
#define NCCL_WINDOW_SYMMETRIC 1    /* NCCL_WIN_COLL_SYMMETRIC */
#define NCCL_WINDOW_ALIGNMENT 4096 /* NCCL_WIN_REQUIRED_ALIGNMENT */
#define NCCL_TYPE_INT8 0           /* ncclInt8 */
#define NCCL_IN_PROGRESS 7         /* ncclInProgress */

typedef struct {
  int (*GetVersion)(int *version);
  const char *(*GetErrorString)(int result);
  int (*CommCount)(ncclComm_t comm, int *count);
  int (*CommUserRank)(ncclComm_t comm, int *rank);
  int (*CommCuDevice)(ncclComm_t comm, int *device);
  int (*AllGather)(const void *send, void *recv, size_t count, int type, ncclComm_t comm,
                   cudaStream_t stream);
  int (*CommGetAsyncError)(ncclComm_t comm, int *result); /* null: no communicator that does not block */
  bool hasWindows;                                        /* else the rest may be null */
  int (*MemAlloc)(void **ptr, size_t bytes);
  int (*MemFree)(void *ptr);
  int (*CommWindowRegister)(ncclComm_t comm, void *buffer, size_t bytes, ncclWindow_t *window, int flags);
  int (*CommWindowDeregister)(ncclComm_t comm, ncclWindow_t window);
  int (*GetPeerDevicePointer)(ncclWindow_t window, size_t offset, int peer, void **ptr);
} ncclSymbols_t;

/* Sets *symbols to the functions of the NCCL in this process. ultraepInvalidUsage, and a message that says
 * what is missing, when NCCL is not loaded or lacks one of the first. */
ultraepResult_t nccl_symbols_find(const ncclSymbols_t **symbols);

#endif
