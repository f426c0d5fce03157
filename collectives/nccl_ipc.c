/* Peers' memory without NCCL's windows: every rank names its memory to the others over the communicator,
 * sends the file descriptors that NCCL cannot carry over a socket, and maps what it got.
 *
 * Memory of the group's own is cuMem's where there is any: each mapping keeps it, so ranks may free and unmap
 * in any order. Memory of cudaMalloc must be kept by its owner until the peers have unmapped it: nLent counts
 * such regions, and nccl_group.c and nccl_memory.c let the owner wait. */
#include "nccl_backend.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define IPC_ALIGNMENT 16 /* what ultraepMemRegister asks for anyway */
#define IPC_SLICE_MS 2   /* how often full queues are tried again, and an abort is looked for */

/* What a rank says of its memory. */
typedef struct {
  int32_t result, reserved;
  uint64_t offset; /* of the region in the allocation */
  peerAddress_t address;
  peerMemoryName_t name;
} ipcOffer_t;
_Static_assert(sizeof(ipcOffer_t) <= NCCL_AGREE_BYTES, "an offer is one message");

/* Goes along with a descriptor, or says that it does not come. */
typedef struct {
  uint64_t number; /* of the region; those of an earlier one that failed may still be under way */
  int32_t rank, result;
} ipcMessage_t;
_Static_assert(sizeof(ipcMessage_t) <= PEER_SOCKET_BYTES, "it is one message");

/* One region being opened. */
typedef struct {
  ncclRank_t *self;
  ipcOffer_t mine, *all; /* [R] */
  int fd;                /* of this rank's memory, or -1 */
  int *fds;              /* [R] of the peers', or -1 */
  bool *isSent;          /* [R] */
  int nToSend, nToCome;
} ipcOpening_t;

static ultraepResult_t ipc_alloc(ncclRank_t *self, size_t bytes, void **ptr) {
  return peer_memory_alloc(self->device, bytes, ptr);
}

static void ipc_release(ncclRank_t *self, void *ptr) {
  (void)self;
  peer_memory_free(ptr);
}

/* This rank's offer; what is wrong with it is told to the others with it. */
static ultraepResult_t ipc_describe(ipcOpening_t *x, const ncclRegion_t *region) {
  ncclRank_t *self = x->self;
  ultraepResult_t result = ultraepSuccess;
  if (self->socket.fd < 0) result = peer_socket_open(&self->socket);
  if (result == ultraepSuccess) result = peer_memory_describe(region->base, &x->mine.name, &x->fd);
  if (result != ultraepSuccess) return result;
  if (x->mine.name.kind == PEER_MEMORY_NONE)
    return error_set(ultraepInvalidUsage,
                     "the memory at %p cannot be shared with other ranks: it must come from "
                     "cudaMalloc or ncclMemAlloc",
                     region->base);
  x->mine.offset = (uint64_t)(uintptr_t)region->base - x->mine.name.base;
  if (region->bytes > x->mine.name.bytes - x->mine.offset)
    return error_set(ultraepInvalidUsage,
                     "[%p, +%zu) does not lie in one allocation: only %llu bytes of it do", region->base,
                     region->bytes, (unsigned long long)(x->mine.name.bytes - x->mine.offset));
  x->mine.address = self->socket.address;
  return ultraepSuccess;
}

static bool ipc_same_process(const peerMemoryName_t *a, const peerMemoryName_t *b) {
  return a->pid == b->pid && a->host == b->host;
}

static ultraepResult_t ipc_exchange_offers(ipcOpening_t *x) {
  ncclRank_t *self = x->self;
  ultraepResult_t own = (ultraepResult_t)x->mine.result;
  ultraepResult_t result = nccl_agree(self, &x->mine, x->all, sizeof(x->mine), "memory");
  if (result != ultraepSuccess) return result;
  if (own != ultraepSuccess) return own;
  for (int r = 0; r < self->nRanks; r++) {
    if (x->all[r].result != ultraepSuccess)
      return error_set(ultraepRemoteError, "memory: rank %d cannot share its memory: %s", r,
                       ultraepGetErrorString((ultraepResult_t)x->all[r].result));
    if (r == self->rank || ipc_same_process(&x->all[r].name, &x->mine.name)) continue;
    if (x->mine.name.kind == PEER_MEMORY_FD) x->nToSend++;
    if (x->all[r].name.kind == PEER_MEMORY_FD) x->nToCome++;
  }
  return ultraepSuccess;
}

/* ---- descriptors ---- */

/* Sends what has not been sent; a full queue is left for the next time. With a failure, that instead. */
static ultraepResult_t ipc_send(ipcOpening_t *x, ultraepResult_t failure) {
  ncclRank_t *self = x->self;
  ipcMessage_t message = {self->nOpened, self->rank, (int32_t)failure};
  ultraepResult_t first = ultraepSuccess;
  for (int r = 0; r < self->nRanks && x->nToSend > 0; r++) {
    if (r == self->rank || x->isSent[r] || ipc_same_process(&x->all[r].name, &x->mine.name)) continue;
    ultraepResult_t result = peer_socket_send(&self->socket, &x->all[r].address, &message, sizeof(message),
                                              failure == ultraepSuccess ? x->fd : -1);
    if (result == ultraepInProgress) continue;
    x->isSent[r] = true;
    x->nToSend--;
    if (result != ultraepSuccess && first == ultraepSuccess)
      first = error_set(ultraepInvalidUsage, "rank %d cannot share its memory with rank %d: %s", self->rank,
                        r, error_text());
  }
  return first;
}

/* One message, if it comes within the time. */
static ultraepResult_t ipc_receive(ipcOpening_t *x, int timeoutMs) {
  const ncclRank_t *self = x->self;
  ipcMessage_t message;
  size_t bytes = 0;
  int fd = -1;
  ultraepResult_t result =
      peer_socket_receive(&self->socket, &message, sizeof(message), &bytes, &fd, timeoutMs);
  if (result == ultraepTimeout) return ultraepSuccess;
  if (result != ultraepSuccess) return result;
  bool isWanted = bytes == sizeof(message) && message.number == self->nOpened && message.rank >= 0 &&
                  message.rank < self->nRanks && x->fds[message.rank] < 0;
  if (isWanted && message.result == ultraepSuccess && fd >= 0) {
    x->fds[message.rank] = fd;
    x->nToCome--;
    return ultraepSuccess;
  }
  if (fd >= 0) (void)close(fd);
  if (!isWanted) return ultraepSuccess;
  return error_set(ultraepRemoteError, "memory: rank %d failed to share its memory: %s", message.rank,
                   ultraepGetErrorString((ultraepResult_t)message.result));
}

static ultraepResult_t ipc_exchange_descriptors(ipcOpening_t *x) {
  ncclRank_t *self = x->self;
  int64_t deadline = nccl_now_ms() + self->timeoutMs;
  const volatile int32_t *abort = &self->failure->abort;
  ultraepResult_t result = ultraepSuccess;
  while (result == ultraepSuccess && (x->nToSend > 0 || x->nToCome > 0)) {
    result = ipc_send(x, ultraepSuccess);
    if (result == ultraepSuccess && (x->nToSend > 0 || x->nToCome > 0)) result = ipc_receive(x, IPC_SLICE_MS);
    if (result != ultraepSuccess) break;
    if (*abort)
      result = error_set(ultraepRemoteError, "memory: the group was aborted on this rank");
    else if (nccl_now_ms() > deadline)
      result = error_set(ultraepSystemError,
                         "memory: %d file descriptors of other ranks did not come within %d ms", x->nToCome,
                         self->timeoutMs);
  }
  /* So that nobody waits for a descriptor that does not come. */
  if (result != ultraepSuccess) {
    char text[ERROR_TEXT_BYTES];
    snprintf(text, sizeof(text), "%s", error_text());
    (void)ipc_send(x, result);
    error_record("%s", text);
  }
  return result;
}

/* ---- mapping ---- */

static ultraepResult_t ipc_map(ipcOpening_t *x, ncclRegion_t *region) {
  ncclRank_t *self = x->self;
  region->peers[self->rank] = region->base;
  for (int r = 0; r < self->nRanks; r++) {
    if (r == self->rank) continue;
    const ipcOffer_t *offer = &x->all[r];
    ultraepResult_t result =
        peer_memory_map_kept(&offer->name, x->fds[r], self->device, &region->mappings[r]);
    if (result == ultraepInvalidUsage)
      return error_set(result, "rank %d cannot reach rank %d's memory: %s", self->rank, r, error_text());
    if (result != ultraepSuccess) return result;
    region->peers[r] = (char *)region->mappings[r].base + offer->offset;
  }
  return ultraepSuccess;
}

static ultraepResult_t ipc_open(ncclRank_t *self, ncclRegion_t *region) {
  size_t nRanks = (size_t)self->nRanks;
  ipcOpening_t x = {.self = self, .fd = -1};
  ultraepResult_t result = ultraepSystemError;
  self->nOpened++;
  x.all = calloc(nRanks, sizeof(*x.all));
  x.fds = malloc(nRanks * sizeof(*x.fds));
  x.isSent = calloc(nRanks, sizeof(*x.isSent));
  region->mappings = calloc(nRanks, sizeof(*region->mappings));
  for (size_t r = 0; x.fds && r < nRanks; r++) x.fds[r] = -1;
  if (!x.all) {
    /* Without a place for the others' offers there is no meeting them: they give up. */
    result = error_set(ultraepSystemError, "no memory for a region");
    goto free_tables;
  }
  if (x.fds && x.isSent && region->mappings)
    x.mine.result = (int32_t)ipc_describe(&x, region);
  else
    x.mine.result = (int32_t)error_set(ultraepSystemError, "no memory for a region");
  result = ipc_exchange_offers(&x);
  if (result == ultraepSuccess) result = ipc_exchange_descriptors(&x);
  if (result == ultraepSuccess) result = ipc_map(&x, region);
  region->isLent = result == ultraepSuccess && x.mine.name.kind == PEER_MEMORY_IPC;
  self->nLent += region->isLent;

free_tables:
  for (size_t r = 0; x.fds && r < nRanks; r++)
    if (x.fds[r] >= 0) (void)close(x.fds[r]);
  if (x.fd >= 0) (void)close(x.fd);
  free(x.isSent);
  free(x.fds);
  free(x.all);
  return result;
}

static void ipc_close(ncclRank_t *self, ncclRegion_t *region) {
  for (int r = 0; region->mappings && r < self->nRanks; r++) peer_memory_unmap(&region->mappings[r]);
  free(region->mappings);
  region->mappings = NULL;
}

const ncclPeers_t ncclPeersIpc = {
    .alignment = IPC_ALIGNMENT,
    .meetsToFree = true,
    .alloc = ipc_alloc,
    .release = ipc_release,
    .open = ipc_open,
    .close = ipc_close,
};
