/* libultraep-preload.so: the calls of p2p.h under NCCL's own names, for LD_PRELOAD. It also sees programs
 * that find these names by dlsym(RTLD_DEFAULT); a dlsym on libnccl's own handle goes past it. */
#include "p2p.h"

#include <dlfcn.h>
#include <pthread.h>

#define PRELOAD_EXPORT __attribute__((visibility("default")))

PRELOAD_EXPORT int ncclSend(const void *buffer, size_t count, int type, int peer, void *comm, void *stream);
PRELOAD_EXPORT int ncclRecv(void *buffer, size_t count, int type, int peer, void *comm, void *stream);
PRELOAD_EXPORT int ncclGroupStart(void);
PRELOAD_EXPORT int ncclGroupEnd(void);
PRELOAD_EXPORT int ncclAlltoAll(const void *send, void *recv, size_t count, int type, void *comm,
                                void *stream);
PRELOAD_EXPORT int ncclAllToAll(const void *send, void *recv, size_t count, int type, void *comm,
                                void *stream);
PRELOAD_EXPORT int ncclGather(const void *send, void *recv, size_t count, int type, int root, void *comm,
                              void *stream);
PRELOAD_EXPORT int ncclScatter(const void *send, void *recv, size_t count, int type, int root, void *comm,
                               void *stream);
PRELOAD_EXPORT int ncclPutSignal(const void *buffer, size_t count, int type, int peer, void *window,
                                 size_t offset, int signal, int context, unsigned flags, void *comm,
                                 void *stream);
PRELOAD_EXPORT int ncclCommDestroy(void *comm);
PRELOAD_EXPORT int ncclCommAbort(void *comm);
PRELOAD_EXPORT int ncclCommFinalize(void *comm);
PRELOAD_EXPORT int ncclCommInitRank(void **comm, int nRanks, p2p_unique_id_t id, int rank);
PRELOAD_EXPORT int ncclCommInitRankConfig(void **comm, int nRanks, p2p_unique_id_t id, int rank,
                                          void *config);
PRELOAD_EXPORT int ncclCommInitRankScalable(void **comm, int nRanks, int rank, int nIds,
                                            const p2p_unique_id_t *ids, void *config);
PRELOAD_EXPORT int ncclCommInitAll(void **comms, int nDevices, const int *devices);
PRELOAD_EXPORT int ncclCommSplit(void *parent, int colour, int key, void **comm, void *config);
PRELOAD_EXPORT int ncclCommShrink(void *parent, int *excluded, int nExcluded, void **comm, void *config,
                                  int flags);
PRELOAD_EXPORT int ncclCommGrow(void *parent, int nRanks, const p2p_unique_id_t *id, int rank, void **comm,
                                void *config);
PRELOAD_EXPORT int ncclCommGetAsyncError(void *comm, int *error);
PRELOAD_EXPORT int ncclCommRevoke(void *comm, int flags);
PRELOAD_EXPORT int ncclGroupSimulateEnd(void *info);

/* By which the plugin, where it is loaded, too, knows that the calls pass here and are counted here. */
PRELOAD_EXPORT extern const char ultraepPreload;
const char ultraepPreload = 1;

static pthread_once_t preloadOnce = PTHREAD_ONCE_INIT;

/* The next one in line, which may be another tracer; else an NCCL that was loaded out of sight. */
static void *preload_symbol(void *library, const char *name) {
  void *symbol = dlsym(RTLD_NEXT, name);

  return symbol || !library ? symbol : dlsym(library, name);
}

static void preload_find(void) {
  void *library = dlopen("libnccl.so.2", RTLD_LAZY | RTLD_NOLOAD);
  struct p2p_nccl nccl = {
      .commCount = (p2p_ask_fn)preload_symbol(library, "ncclCommCount"),
      .commUserRank = (p2p_ask_fn)preload_symbol(library, "ncclCommUserRank"),
      .seesAll = true,
  };

  for (int call = 0; call < P2P_CALLS; call++) nccl.calls[call] = preload_symbol(library, p2pNames[call]);
  p2p_nccl_set(&nccl, p2p_wanted());
}

static void preload_ready(void) {
  pthread_once(&preloadOnce, preload_find);
}

int ncclSend(const void *buffer, size_t count, int type, int peer, void *comm, void *stream) {
  preload_ready();
  return p2p_send(buffer, count, type, peer, comm, stream);
}

int ncclRecv(void *buffer, size_t count, int type, int peer, void *comm, void *stream) {
  preload_ready();
  return p2p_recv(buffer, count, type, peer, comm, stream);
}

int ncclGroupStart(void) {
  preload_ready();
  return p2p_group_start();
}

int ncclGroupEnd(void) {
  preload_ready();
  return p2p_group_end();
}

int ncclAlltoAll(const void *send, void *recv, size_t count, int type, void *comm, void *stream) {
  preload_ready();
  return p2p_alltoall(send, recv, count, type, comm, stream);
}

int ncclAllToAll(const void *send, void *recv, size_t count, int type, void *comm, void *stream) {
  preload_ready();
  return p2p_all_to_all(send, recv, count, type, comm, stream);
}

int ncclCommDestroy(void *comm) {
  preload_ready();
  return p2p_comm_destroy(comm);
}

int ncclCommAbort(void *comm) {
  preload_ready();
  return p2p_comm_abort(comm);
}

int ncclCommFinalize(void *comm) {
  preload_ready();
  return p2p_comm_finalize(comm);
}

int ncclGather(const void *send, void *recv, size_t count, int type, int root, void *comm, void *stream) {
  preload_ready();
  return p2p_gather(send, recv, count, type, root, comm, stream);
}

int ncclScatter(const void *send, void *recv, size_t count, int type, int root, void *comm, void *stream) {
  preload_ready();
  return p2p_scatter(send, recv, count, type, root, comm, stream);
}

int ncclPutSignal(const void *buffer, size_t count, int type, int peer, void *window, size_t offset,
                  int signal, int context, unsigned flags, void *comm, void *stream) {
  preload_ready();
  return p2p_put_signal(buffer, count, type, peer, window, offset, signal, context, flags, comm, stream);
}

int ncclCommInitRank(void **comm, int nRanks, p2p_unique_id_t id, int rank) {
  preload_ready();
  return p2p_comm_init_rank(comm, nRanks, id, rank);
}

int ncclCommInitRankConfig(void **comm, int nRanks, p2p_unique_id_t id, int rank, void *config) {
  preload_ready();
  return p2p_comm_init_rank_config(comm, nRanks, id, rank, config);
}

int ncclCommInitRankScalable(void **comm, int nRanks, int rank, int nIds, const p2p_unique_id_t *ids,
                             void *config) {
  preload_ready();
  return p2p_comm_init_rank_scalable(comm, nRanks, rank, nIds, ids, config);
}

int ncclCommInitAll(void **comms, int nDevices, const int *devices) {
  preload_ready();
  return p2p_comm_init_all(comms, nDevices, devices);
}

int ncclCommSplit(void *parent, int colour, int key, void **comm, void *config) {
  preload_ready();
  return p2p_comm_split(parent, colour, key, comm, config);
}

int ncclCommShrink(void *parent, int *excluded, int nExcluded, void **comm, void *config, int flags) {
  preload_ready();
  return p2p_comm_shrink(parent, excluded, nExcluded, comm, config, flags);
}

int ncclCommGrow(void *parent, int nRanks, const p2p_unique_id_t *id, int rank, void **comm, void *config) {
  preload_ready();
  return p2p_comm_grow(parent, nRanks, id, rank, comm, config);
}

int ncclCommRevoke(void *comm, int flags) {
  preload_ready();
  return p2p_comm_revoke(comm, flags);
}

int ncclGroupSimulateEnd(void *info) {
  preload_ready();
  return p2p_group_simulate_end(info);
}

int ncclCommGetAsyncError(void *comm, int *error) {
  preload_ready();
  return p2p_comm_async_error(comm, error);
}
