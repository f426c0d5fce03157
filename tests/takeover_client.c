#include "takeover_client.h"

#include <dlfcn.h>

static int client_send(const void *buffer, size_t count, int type, int peer, void *comm, void *stream) {
  int result = ncclSend(buffer, count, type, peer, comm, stream);

  return result; /* not a jump: the call must be this object's */
}

static int client_recv(void *buffer, size_t count, int type, int peer, void *comm, void *stream) {
  return ncclRecv(buffer, count, type, peer, comm, stream);
}

static int client_group_start(void) {
  return ncclGroupStart();
}

static int client_group_end(void) {
  return ncclGroupEnd();
}

static int client_all_to_all(const void *send, void *recv, size_t count, int type, void *comm, void *stream) {
  return ncclAlltoAll(send, recv, count, type, comm, stream);
}

static int client_init(void **comm, int nRanks, int rank) {
  return ncclCommInitRank(comm, nRanks, rank);
}

static int client_destroy(void *comm) {
  return ncclCommDestroy(comm);
}

static int client_abort(void *comm) {
  return ncclCommAbort(comm);
}

static int client_finalize(void *comm) {
  return ncclCommFinalize(comm);
}

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
    .allToAll = client_all_to_all,
    .init = client_init,
    .destroy = client_destroy,
    .abort = client_abort,
    .finalize = client_finalize,
    .open = client_open,
};
