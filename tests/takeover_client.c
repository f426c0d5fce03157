#include "takeover_client.h"

#include <dlfcn.h>

/* Every call is this object's own; the result is looked at, so that none becomes a jump. */
#define CLIENT(name, call, parameters, arguments)                                                            \
  static int client_##name parameters {                                                                      \
    volatile int result = call arguments;                                                                    \
                                                                                                             \
    return result;                                                                                           \
  }

CLIENT(send, ncclSend, (const void *buffer, size_t count, int type, int peer, void *comm, void *stream),
       (buffer, count, type, peer, comm, stream))
CLIENT(recv, ncclRecv, (void *buffer, size_t count, int type, int peer, void *comm, void *stream),
       (buffer, count, type, peer, comm, stream))
CLIENT(group_start, ncclGroupStart, (void), ())
CLIENT(group_end, ncclGroupEnd, (void), ())
CLIENT(group_simulate_end, ncclGroupSimulateEnd, (void *info), (info))
CLIENT(all_reduce, ncclAllReduce,
       (const void *send, void *recv, size_t count, int type, int op, void *comm, void *stream),
       (send, recv, count, type, op, comm, stream))
CLIENT(all_to_all, ncclAlltoAll,
       (const void *send, void *recv, size_t count, int type, void *comm, void *stream),
       (send, recv, count, type, comm, stream))
CLIENT(gather, ncclGather,
       (const void *send, void *recv, size_t count, int type, int root, void *comm, void *stream),
       (send, recv, count, type, root, comm, stream))
CLIENT(scatter, ncclScatter,
       (const void *send, void *recv, size_t count, int type, int root, void *comm, void *stream),
       (send, recv, count, type, root, comm, stream))
CLIENT(put_signal, ncclPutSignal,
       (const void *buffer, size_t count, int type, int peer, void *window, size_t offset, int signal,
        int context, unsigned flags, void *comm, void *stream),
       (buffer, count, type, peer, window, offset, signal, context, flags, comm, stream))
CLIENT(init, ncclCommInitRank, (void **comm, int nRanks, fake_id id, int rank), (comm, nRanks, id, rank))
CLIENT(init_config, ncclCommInitRankConfig, (void **comm, int nRanks, fake_id id, int rank, void *config),
       (comm, nRanks, id, rank, config))
CLIENT(init_scalable, ncclCommInitRankScalable,
       (void **comm, int nRanks, int rank, int nIds, const fake_id *ids, void *config),
       (comm, nRanks, rank, nIds, ids, config))
CLIENT(init_all, ncclCommInitAll, (void **comms, int nDevices, const int *devices),
       (comms, nDevices, devices))
CLIENT(split, ncclCommSplit, (void *parent, int colour, int key, void **comm, void *config),
       (parent, colour, key, comm, config))
CLIENT(shrink, ncclCommShrink,
       (void *parent, int *excluded, int nExcluded, void **comm, void *config, int flags),
       (parent, excluded, nExcluded, comm, config, flags))
CLIENT(grow, ncclCommGrow, (void *parent, int nRanks, const fake_id *id, int rank, void **comm, void *config),
       (parent, nRanks, id, rank, comm, config))
CLIENT(async_error, ncclCommGetAsyncError, (void *comm, int *error), (comm, error))
CLIENT(destroy, ncclCommDestroy, (void *comm), (comm))
CLIENT(abort, ncclCommAbort, (void *comm), (comm))
CLIENT(finalize, ncclCommFinalize, (void *comm), (comm))
CLIENT(revoke, ncclCommRevoke, (void *comm, int flags), (comm, flags))

/* The handle is looked at, so that dlopen's return address is in this object, as its RUNPATH needs. */
static void *client_open(const char *file, int mode) {
  void *volatile handle = dlopen(file, mode);

  return handle;
}

__attribute__((visibility("default"))) const struct client client = {
    .send = client_send,
    .recv = client_recv,
    .groupStart = client_group_start,
    .groupEnd = client_group_end,
    .groupSimulateEnd = client_group_simulate_end,
    .allReduce = client_all_reduce,
    .allToAll = client_all_to_all,
    .gather = client_gather,
    .scatter = client_scatter,
    .putSignal = client_put_signal,
    .init = client_init,
    .initConfig = client_init_config,
    .initScalable = client_init_scalable,
    .initAll = client_init_all,
    .split = client_split,
    .shrink = client_shrink,
    .grow = client_grow,
    .asyncError = client_async_error,
    .destroy = client_destroy,
    .abort = client_abort,
    .finalize = client_finalize,
    .revoke = client_revoke,
    .open = client_open,
};
