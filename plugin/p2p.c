#include "p2p.h"

#include "settings.h"
#include "traffic.h"

#include <stdatomic.h>
#include <stdint.h>

const char *const p2pNames[P2P_CALLS] = {
    [P2P_SEND] = "ncclSend",
    [P2P_RECV] = "ncclRecv",
    [P2P_GROUP_START] = "ncclGroupStart",
    [P2P_GROUP_END] = "ncclGroupEnd",
    [P2P_ALLTOALL] = "ncclAlltoAll",
    [P2P_ALL_TO_ALL] = "ncclAllToAll",
    [P2P_COMM_DESTROY] = "ncclCommDestroy",
    [P2P_COMM_ABORT] = "ncclCommAbort",
    [P2P_COMM_FINALIZE] = "ncclCommFinalize",
};

const void *const p2pHooks[P2P_CALLS] = {
    [P2P_SEND] = (const void *)p2p_send,
    [P2P_RECV] = (const void *)p2p_recv,
    [P2P_GROUP_START] = (const void *)p2p_group_start,
    [P2P_GROUP_END] = (const void *)p2p_group_end,
    [P2P_ALLTOALL] = (const void *)p2p_alltoall,
    [P2P_ALL_TO_ALL] = (const void *)p2p_all_to_all,
    [P2P_COMM_DESTROY] = (const void *)p2p_comm_destroy,
    [P2P_COMM_ABORT] = (const void *)p2p_comm_abort,
    [P2P_COMM_FINALIZE] = (const void *)p2p_comm_finalize,
};

/* Any thread reads these in every call, so they are atomics without order: whoever makes the calls reachable
 * orders them. */
static _Atomic(void *) p2pOriginals[P2P_CALLS];
static _Atomic(p2p_ask_fn) p2pCommCount, p2pCommUserRank;
static _Atomic(void (*)(void)) p2pWatch;
static atomic_bool p2pCounts;
/* In an all-to-all, which is counted as such: where we stand before NCCL for everybody (preload), its own
 * sends pass here, too. */
static _Thread_local bool p2pInside;

#define P2P_LOAD(object) atomic_load_explicit(&(object), memory_order_relaxed)
#define P2P_STORE(object, value) atomic_store_explicit(&(object), (value), memory_order_relaxed)

void p2p_nccl_set(const struct p2p_nccl *nccl, bool counts) {
  for (int call = 0; call < P2P_CALLS; call++) P2P_STORE(p2pOriginals[call], nccl->calls[call]);
  P2P_STORE(p2pCommCount, nccl->commCount);
  P2P_STORE(p2pCommUserRank, nccl->commUserRank);
  P2P_STORE(p2pCounts, counts && nccl->commCount && nccl->commUserRank);
}

void *p2p_original(enum p2p_call call) {
  return P2P_LOAD(p2pOriginals[call]);
}

void p2p_group_watch(void (*watch)(void)) {
  P2P_STORE(p2pWatch, watch);
}

size_t p2p_type_bytes(int type) {
  /* int8, uint8, int32, uint32, int64, uint64, float16, float32, float64, bfloat16, float8e4m3, float8e5m2 */
  static const unsigned char bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};

  return type >= 0 && (size_t)type < sizeof(bytes) ? bytes[type] : 0;
}

bool p2p_wanted(void) {
  return settings_get()->p2p != SETTINGS_P2P_OFF;
}

/* ---- counting ---- */
/* A communicator that is not ready yet, or is none, has no rank; its operation fails by itself then. */
static trafficComm_t *p2p_record_open(void *comm) {
  int rank, nRanks;

  if (P2P_LOAD(p2pCommUserRank)(comm, &rank) != P2P_NCCL_SUCCESS) return NULL;
  if (P2P_LOAD(p2pCommCount)(comm, &nRanks) != P2P_NCCL_SUCCESS) return NULL;
  return traffic_comm_open(comm, 0, rank, nRanks);
}

/* Null where nothing is to be counted: the operation failed, or there is no record. */
static trafficComm_t *p2p_record(void *comm, int result) {
  trafficComm_t *record;

  if (result != P2P_NCCL_SUCCESS && result != P2P_NCCL_IN_PROGRESS) return NULL;
  if (!P2P_LOAD(p2pCounts)) return NULL;
  record = traffic_comm_find(comm);
  return record ? record : p2p_record_open(comm);
}

static void p2p_count(void *comm, int result, trafficDirection_t direction, int peer, size_t count,
                      int type) {
  trafficComm_t *record = p2pInside ? NULL : p2p_record(comm, result);

  if (record) traffic_count(record, direction, peer, (uint64_t)count * p2p_type_bytes(type));
}

/* count: elements for each peer. Every rank sends to and receives from every other, and itself. */
static void p2p_count_all(void *comm, int result, size_t count, int type) {
  const uint64_t bytes = (uint64_t)count * p2p_type_bytes(type);
  trafficComm_t *record = p2p_record(comm, result);
  int nRanks;

  if (!record || P2P_LOAD(p2pCommCount)(comm, &nRanks) != P2P_NCCL_SUCCESS) return;
  for (int peer = 0; peer < nRanks; peer++) {
    traffic_count(record, TRAFFIC_SEND, peer, bytes);
    traffic_count(record, TRAFFIC_RECV, peer, bytes);
  }
}

/* Before the original: after it another communicator may have got the same address. */
static void p2p_record_close(void *comm) {
  trafficComm_t *record = P2P_LOAD(p2pCounts) ? traffic_comm_find(comm) : NULL;

  if (record) traffic_comm_close(record);
}

/* ---- the calls ---- */
int p2p_send(const void *buffer, size_t count, int type, int peer, void *comm, void *stream) {
  p2p_send_fn original = (p2p_send_fn)p2p_original(P2P_SEND);
  int result = P2P_NCCL_INVALID_USAGE;

  if (original) result = original(buffer, count, type, peer, comm, stream);
  p2p_count(comm, result, TRAFFIC_SEND, peer, count, type);
  return result;
}

int p2p_recv(void *buffer, size_t count, int type, int peer, void *comm, void *stream) {
  p2p_recv_fn original = (p2p_recv_fn)p2p_original(P2P_RECV);
  int result = P2P_NCCL_INVALID_USAGE;

  if (original) result = original(buffer, count, type, peer, comm, stream);
  p2p_count(comm, result, TRAFFIC_RECV, peer, count, type);
  return result;
}

int p2p_group_start(void) {
  p2p_group_fn original = (p2p_group_fn)p2p_original(P2P_GROUP_START);
  void (*watch)(void) = P2P_LOAD(p2pWatch);

  if (watch) watch();
  return original ? original() : P2P_NCCL_INVALID_USAGE;
}

int p2p_group_end(void) {
  p2p_group_fn original = (p2p_group_fn)p2p_original(P2P_GROUP_END);

  return original ? original() : P2P_NCCL_INVALID_USAGE;
}

static int p2p_all(enum p2p_call call, const void *send, void *recv, size_t count, int type, void *comm,
                   void *stream) {
  p2p_all_fn original = (p2p_all_fn)p2p_original(call);
  int result = P2P_NCCL_INVALID_USAGE;

  p2pInside = true;
  if (original) result = original(send, recv, count, type, comm, stream);
  p2pInside = false;
  p2p_count_all(comm, result, count, type);
  return result;
}

int p2p_alltoall(const void *send, void *recv, size_t count, int type, void *comm, void *stream) {
  return p2p_all(P2P_ALLTOALL, send, recv, count, type, comm, stream);
}

int p2p_all_to_all(const void *send, void *recv, size_t count, int type, void *comm, void *stream) {
  return p2p_all(P2P_ALL_TO_ALL, send, recv, count, type, comm, stream);
}

static int p2p_comm_end(enum p2p_call call, void *comm) {
  p2p_comm_fn original = (p2p_comm_fn)p2p_original(call);

  if (!original) return P2P_NCCL_INVALID_USAGE;
  p2p_record_close(comm);
  return original(comm);
}

int p2p_comm_destroy(void *comm) {
  return p2p_comm_end(P2P_COMM_DESTROY, comm);
}

int p2p_comm_abort(void *comm) {
  return p2p_comm_end(P2P_COMM_ABORT, comm);
}

/* No operation may follow it, so the record ends here already. */
int p2p_comm_finalize(void *comm) {
  return p2p_comm_end(P2P_COMM_FINALIZE, comm);
}
