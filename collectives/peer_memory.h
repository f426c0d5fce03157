/* Device memory of other ranks: described by its owner, sent as plain bytes, mapped by whoever gets them.
 *
 * A name covers one allocation: all of a cudaMalloc's memory; of memory made with the driver's virtual memory
 * calls (cuMem: ncclMemAlloc, peer_memory_alloc) one handle's mapping. A buffer may span several of the
 * latter side by side (PyTorch's expandable segments): who shares a buffer compares its end with the name's,
 * and describes on from base + bytes.
 *
 * Nothing here synchronises the device on purpose; the driver may, in cudaMalloc's memory more than in
 * cuMem's. CUDA's last error is left alone. Calls may come from any thread, whatever its current device; the
 * devices' primary contexts must be in use (those of communicators are), and stay so until the mappings are
 * undone. */
#ifndef ULTRAEP_PEER_MEMORY_H_
#define ULTRAEP_PEER_MEMORY_H_

#include "ultraep.h"

#include <stdbool.h>

typedef enum {
  PEER_MEMORY_NONE, /* cannot be shared: managed, host, stream-ordered pool memory; no CUDA memory at all */
  PEER_MEMORY_PROCESS, /* of a mapping: the owner's own pointer, the ranks are threads of one process */
  PEER_MEMORY_IPC,     /* cudaMalloc's */
  PEER_MEMORY_FD,      /* cuMem, behind a POSIX file descriptor */
  PEER_MEMORY_FABRIC   /* cuMem, behind a fabric handle, good on other machines too */
} peerMemoryKind_t;

/* Names an allocation to other ranks: plain bytes. */
typedef struct {
  uint32_t kind; /* how other processes map it */
  int32_t pid;
  uint64_t host;        /* peer_host_id of the owner: with pid, its process */
  uint64_t base, bytes; /* of the whole allocation, in the owner */
  uint64_t bufferId;    /* unique in the owner's process, never used again there */
  unsigned char handle[64];
} peerMemoryName_t;

/* An allocation of another rank as this process sees it: base is the allocation's, not a buffer's in it. */
typedef struct {
  void *base;
  uint64_t bytes;
  uint32_t kind;  /* peerMemoryKind_t; PEER_MEMORY_NONE: nothing is mapped */
  int32_t device; /* that reaches it */
} peerMapping_t;

/* Names the allocation that ptr lies in. *fd >= 0 for PEER_MEMORY_FD only: the caller sends it along
 * (peer_socket.h) and closes it. Memory that cannot be shared is kind PEER_MEMORY_NONE, not an error. */
ultraepResult_t peer_memory_describe(const void *ptr, peerMemoryName_t *name, int *fd);

/* The allocation that ptr lies in, by two driver calls. ultraepInvalidArgument: it lies in none. */
ultraepResult_t peer_memory_look(const void *ptr, uint64_t *base, uint64_t *bytes, uint64_t *bufferId);

/* Makes the named allocation readable and writable from `device`. fd: what came with a PEER_MEMORY_FD name,
 * still the caller's to close; -1 otherwise and within one process. The owner should keep the allocation
 * until every peer has unmapped it: cuMem memory lives on, what cudaMalloc gave does not.
 * ultraepInvalidUsage: it cannot be reached from here. */
ultraepResult_t peer_memory_map(const peerMemoryName_t *name, int fd, int device, peerMapping_t *mapping);
/* The same, for memory whose owner may free it at any time: where cuMem memory's owner is this process, it is
 * mapped once more, so that it lives as long as this mapping. *mapping's kind says what was done:
 * PEER_MEMORY_IPC and PEER_MEMORY_PROCESS do not outlive the owner's. */
ultraepResult_t peer_memory_map_kept(const peerMemoryName_t *name, int fd, int device,
                                     peerMapping_t *mapping);
void peer_memory_unmap(peerMapping_t *mapping);

/* In the owner: whether this is still the same allocation. */
bool peer_memory_is_alive(const peerMemoryName_t *name);

/* The owner is this process: mapping needs no descriptor. */
bool peer_memory_is_mine(const peerMemoryName_t *name);

/* Memory of `device` that can be shared: cuMem with every kind of handle the driver gives, which neither
 * waits for kernels nor makes them wait; cudaMalloc's where there is none. Uninitialised, aligned to 4096
 * bytes at least. Freed by peer_memory_free, which does not wait for work on it either: end that first. */
ultraepResult_t peer_memory_alloc(int device, size_t bytes, void **ptr);
void peer_memory_free(void *ptr);

/* Makes the device's primary context current to the thread, over whatever was, which leave brings back: a
 * context of another device or of the program's own, or none. cudaSetDevice could not: it makes a context,
 * hundreds of megabytes of memory, on the device that it returns to. False: it did not, and nothing is to be
 * left. */
bool peer_context_enter(int device);
void peer_context_leave(int device);

#endif
