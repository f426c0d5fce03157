#include "p2p.h"

#include "comm_id.h"
#include "p2p_pending.h"
#include "schedule.h"
#include "settings.h"
#include "traffic.h"

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

const char *const p2pNames[P2P_CALLS] = {
    [P2P_SEND] = "ncclSend",
    [P2P_RECV] = "ncclRecv",
    [P2P_GROUP_START] = "ncclGroupStart",
    [P2P_GROUP_END] = "ncclGroupEnd",
    [P2P_ALLTOALL] = "ncclAlltoAll",
    [P2P_ALL_TO_ALL] = "ncclAllToAll",
    [P2P_GATHER] = "ncclGather",
    [P2P_SCATTER] = "ncclScatter",
    [P2P_PUT_SIGNAL] = "ncclPutSignal",
    [P2P_COMM_DESTROY] = "ncclCommDestroy",
    [P2P_COMM_ABORT] = "ncclCommAbort",
    [P2P_COMM_FINALIZE] = "ncclCommFinalize",
    [P2P_COMM_INIT_RANK] = "ncclCommInitRank",
    [P2P_COMM_INIT_RANK_CONFIG] = "ncclCommInitRankConfig",
    [P2P_COMM_INIT_RANK_SCALABLE] = "ncclCommInitRankScalable",
    [P2P_COMM_INIT_ALL] = "ncclCommInitAll",
    [P2P_COMM_SPLIT] = "ncclCommSplit",
    [P2P_COMM_SHRINK] = "ncclCommShrink",
    [P2P_COMM_GROW] = "ncclCommGrow",
    [P2P_COMM_ASYNC_ERROR] = "ncclCommGetAsyncError",
    [P2P_COMM_REVOKE] = "ncclCommRevoke",
    [P2P_GROUP_SIMULATE_END] = "ncclGroupSimulateEnd",
};

const void *const p2pHooks[P2P_CALLS] = {
    [P2P_SEND] = (const void *)p2p_send,
    [P2P_RECV] = (const void *)p2p_recv,
    [P2P_GROUP_START] = (const void *)p2p_group_start,
    [P2P_GROUP_END] = (const void *)p2p_group_end,
    [P2P_ALLTOALL] = (const void *)p2p_alltoall,
    [P2P_ALL_TO_ALL] = (const void *)p2p_all_to_all,
    [P2P_GATHER] = (const void *)p2p_gather,
    [P2P_SCATTER] = (const void *)p2p_scatter,
    [P2P_PUT_SIGNAL] = (const void *)p2p_put_signal,
    [P2P_COMM_DESTROY] = (const void *)p2p_comm_destroy,
    [P2P_COMM_ABORT] = (const void *)p2p_comm_abort,
    [P2P_COMM_FINALIZE] = (const void *)p2p_comm_finalize,
    [P2P_COMM_INIT_RANK] = (const void *)p2p_comm_init_rank,
    [P2P_COMM_INIT_RANK_CONFIG] = (const void *)p2p_comm_init_rank_config,
    [P2P_COMM_INIT_RANK_SCALABLE] = (const void *)p2p_comm_init_rank_scalable,
    [P2P_COMM_INIT_ALL] = (const void *)p2p_comm_init_all,
    [P2P_COMM_SPLIT] = (const void *)p2p_comm_split,
    [P2P_COMM_SHRINK] = (const void *)p2p_comm_shrink,
    [P2P_COMM_GROW] = (const void *)p2p_comm_grow,
    [P2P_COMM_ASYNC_ERROR] = (const void *)p2p_comm_async_error,
    [P2P_COMM_REVOKE] = (const void *)p2p_comm_revoke,
    [P2P_GROUP_SIMULATE_END] = (const void *)p2p_group_simulate_end,
};

/* Any thread reads these in every call, so they are atomics without order: whoever makes the calls reachable
 * orders them. */
static _Atomic(void *) p2pOriginals[P2P_CALLS];
static _Atomic(p2p_ask_fn) p2pCommCount, p2pCommUserRank;
static _Atomic(void (*)(void)) p2pWatch;
static atomic_bool p2pCounts, p2pSeesAll;
static _Thread_local struct {
  /* In a call that is counted as a whole: where we stand before NCCL for everybody (preload), its own sends
   * pass here, too. */
  bool isInside;
  int depth;      /* groups that the thread is in */
  int groupError; /* why we refused a call of the group; 0: we did not */
  bool hasOurs;   /* the group has calls of ours */
} p2pThread;

#define P2P_LOAD(object) atomic_load_explicit(&(object), memory_order_relaxed)
#define P2P_STORE(object, value) atomic_store_explicit(&(object), (value), memory_order_relaxed)

void p2p_nccl_set(const struct p2p_nccl *nccl, bool counts) {
  for (int call = 0; call < P2P_CALLS; call++) P2P_STORE(p2pOriginals[call], nccl->calls[call]);
  P2P_STORE(p2pSeesAll, nccl->seesAll);
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

int p2p_group_depth(void) {
  return p2pThread.depth;
}

bool p2p_counts(void) {
  return P2P_LOAD(p2pCounts);
}

bool p2p_sees_all(void) {
  return P2P_LOAD(p2pSeesAll);
}

size_t p2p_type_bytes(int type) {
  /* int8, uint8, int32, uint32, int64, uint64, float16, float32, float64, bfloat16, float8e4m3, float8e5m2 */
  static const unsigned char bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};

  return type >= 0 && (size_t)type < sizeof(bytes) ? bytes[type] : 0;
}

size_t p2p_type_bytes_named(const char *name) {
  /* By NCCL's codes. It has no name for uint8, and writes "Unknown". */
  static const char *const names[] = {"Int8",    "Uint8",    "Int32",      "Uint32",
                                      "Int64",   "Uint64",   "Float16",    "Float32",
                                      "Float64", "Bfloat16", "Float8e4m3", "Float8e5m2"};

  if (!name) return 0;
  if (strncmp(name, "nccl", 4) != 0) return 1;
  for (int type = 0; type < (int)(sizeof(names) / sizeof(names[0])); type++) {
    if (strcmp(name + 4, names[type]) == 0) return p2p_type_bytes(type);
  }
  return 0;
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
  return traffic_comm_open(comm, comm_id_find(comm, rank, nRanks), rank, nRanks);
}

/* Before the original, after which a non-blocking communicator may be too busy to say who it is. Null where
 * nothing is to be counted. */
static trafficComm_t *p2p_record(void *comm) {
  trafficComm_t *record;

  if (!comm || p2pThread.isInside || !P2P_LOAD(p2pCounts)) return NULL;
  record = traffic_comm_find(comm);
  return record ? record : p2p_record_open(comm);
}

static uint64_t p2p_bytes(size_t count, int type) {
  return (uint64_t)count * p2p_type_bytes(type);
}

void p2p_comm_gone(const void *comm) {
  traffic_comm_close(traffic_comm_find(comm));
}

/* ---- by our own kernel ---- */
/* As with NCCL, a call that is refused ends its group, too. */
static int p2p_refused(int result) {
  if (p2pThread.depth == 0) return result;
  if (p2pThread.groupError == P2P_NCCL_SUCCESS) p2pThread.groupError = result;
  p2pThread.hasOurs = true;
  return result;
}

/* The program has not been told yet that the communicator is ready. What NCCL itself calls for us may pass.
 */
static bool p2p_is_early(const void *comm) {
  return p2p_pending(comm) && !p2p_pending_passes();
}

static int p2p_schedule(scheduleComm_t *scheduled, const void *buffer, size_t count, int type, int peer,
                        void *stream, bool isRecv) {
  const scheduleOp_t op = {.buffer = (void *)(uintptr_t)buffer,
                           .bytes = p2p_bytes(count, type),
                           .stream = stream,
                           .peer = peer,
                           .isRecv = isRecv};

  int result = P2P_NCCL_INVALID_ARGUMENT;

  if (p2p_type_bytes(type) != 0 && count <= SIZE_MAX / 16)
    result = schedule_add(scheduled, &op, p2pThread.depth);
  if (p2pThread.depth > 0) p2pThread.hasOurs = true;
  return result == P2P_NCCL_SUCCESS ? result : p2p_refused(result);
}

static const char *p2p_part(const void *buffer, int rank, size_t count, int type) {
  return (const char *)buffer + (size_t)rank * p2p_bytes(count, type);
}

/* The thread's outermost group: launches what it has of ours, unless a call was refused. */
static int p2p_schedule_group_end(void) {
  const int refused = p2pThread.groupError;
  int launched;

  if (!p2pThread.hasOurs) return refused;
  p2pThread.groupError = P2P_NCCL_SUCCESS;
  p2pThread.hasOurs = false;
  launched = schedule_group_ended(refused == P2P_NCCL_SUCCESS);
  return refused == P2P_NCCL_SUCCESS ? launched : refused;
}

/* A group of its own, unless the thread is in one. */
static int p2p_schedule_end(int result) {
  int ended = p2pThread.depth == 1 ? p2p_schedule_group_end() : P2P_NCCL_SUCCESS;

  p2pThread.depth--;
  return result == P2P_NCCL_SUCCESS ? ended : result;
}

static int p2p_schedule_all(scheduleComm_t *scheduled, const void *send, const void *recv, size_t count,
                            int type, void *stream) {
  int result = P2P_NCCL_SUCCESS;

  p2pThread.depth++;
  for (int r = 0; r < schedule_comm_ranks(scheduled) && result == P2P_NCCL_SUCCESS; r++) {
    result = p2p_schedule(scheduled, p2p_part(send, r, count, type), count, type, r, stream, false);
    if (result == P2P_NCCL_SUCCESS)
      result = p2p_schedule(scheduled, p2p_part(recv, r, count, type), count, type, r, stream, true);
  }
  return p2p_schedule_end(result);
}

/* many: the root's buffer, a part for each rank; one: every rank's own. */
static int p2p_schedule_rooted(scheduleComm_t *scheduled, const void *one, const void *many, size_t count,
                               int type, int root, int rank, void *stream, bool toRoot) {
  int result;

  p2pThread.depth++;
  result = p2p_schedule(scheduled, one, count, type, root, stream, !toRoot);
  for (int r = 0; rank == root && r < schedule_comm_ranks(scheduled) && result == P2P_NCCL_SUCCESS; r++)
    result = p2p_schedule(scheduled, p2p_part(many, r, count, type), count, type, r, stream, toRoot);
  return p2p_schedule_end(result);
}

/* ---- the calls ---- */
int p2p_send(const void *buffer, size_t count, int type, int peer, void *comm, void *stream) {
  p2p_send_fn original = (p2p_send_fn)p2p_original(P2P_SEND);
  trafficComm_t *record;
  scheduleComm_t *scheduled;
  int result;

  if (!original) return P2P_NCCL_INVALID_USAGE;
  if (p2p_is_early(comm)) return p2p_refused(P2P_NCCL_INVALID_ARGUMENT);
  record = p2p_record(comm);
  scheduled = schedule_hold(comm);
  result = scheduled ? p2p_schedule(scheduled, buffer, count, type, peer, stream, false)
                     : original(buffer, count, type, peer, comm, stream);
  schedule_release(scheduled);
  if (p2p_issued(result)) traffic_count(record, TRAFFIC_SEND, peer, p2p_bytes(count, type));
  return result;
}

int p2p_recv(void *buffer, size_t count, int type, int peer, void *comm, void *stream) {
  p2p_recv_fn original = (p2p_recv_fn)p2p_original(P2P_RECV);
  trafficComm_t *record;
  scheduleComm_t *scheduled;
  int result;

  if (!original) return P2P_NCCL_INVALID_USAGE;
  if (p2p_is_early(comm)) return p2p_refused(P2P_NCCL_INVALID_ARGUMENT);
  record = p2p_record(comm);
  scheduled = schedule_hold(comm);
  result = scheduled ? p2p_schedule(scheduled, buffer, count, type, peer, stream, true)
                     : original(buffer, count, type, peer, comm, stream);
  schedule_release(scheduled);
  if (p2p_issued(result)) traffic_count(record, TRAFFIC_RECV, peer, p2p_bytes(count, type));
  return result;
}

int p2p_put_signal(const void *buffer, size_t count, int type, int peer, void *window, size_t offset,
                   int signal, int context, unsigned flags, void *comm, void *stream) {
  p2p_put_fn original = (p2p_put_fn)p2p_original(P2P_PUT_SIGNAL);
  trafficComm_t *record;
  int result;

  if (!original) return P2P_NCCL_INVALID_USAGE;
  if (p2p_is_early(comm)) return p2p_refused(P2P_NCCL_INVALID_ARGUMENT);
  record = p2p_record(comm);
  result = original(buffer, count, type, peer, window, offset, signal, context, flags, comm, stream);
  if (p2p_issued(result)) traffic_count(record, TRAFFIC_SEND, peer, p2p_bytes(count, type));
  return result;
}

int p2p_group_start(void) {
  p2p_group_fn original = (p2p_group_fn)p2p_original(P2P_GROUP_START);
  void (*watch)(void) = P2P_LOAD(p2pWatch);

  if (watch) watch();
  if (!original) return P2P_NCCL_INVALID_USAGE;
  p2pThread.depth++;
  return original();
}

/* A thread may leave a group that it entered before we were there. Ours goes first: schedule.h. */
int p2p_group_end(void) {
  p2p_group_fn original = (p2p_group_fn)p2p_original(P2P_GROUP_END);
  int result, scheduled = P2P_NCCL_SUCCESS;

  if (!original) return P2P_NCCL_INVALID_USAGE;
  if (p2pThread.depth <= 1) scheduled = p2p_schedule_group_end();
  result = original();
  if (p2pThread.depth > 0) p2pThread.depth--;
  if (p2pThread.depth > 0) return result;
  result = p2p_pending_group_ended(result);
  return p2p_issued(result) && scheduled != P2P_NCCL_SUCCESS ? scheduled : result;
}

int p2p_group_simulate_end(void *info) {
  p2p_simulate_fn original = (p2p_simulate_fn)p2p_original(P2P_GROUP_SIMULATE_END);
  int result;

  if (!original) return P2P_NCCL_INVALID_USAGE;
  if (p2pThread.depth <= 1) {
    (void)p2p_refused(P2P_NCCL_INVALID_USAGE); /* what is collected is dropped */
    (void)p2p_schedule_group_end();
  }
  result = original(info);
  if (p2pThread.depth > 0) p2pThread.depth--;
  return p2pThread.depth == 0 ? p2p_pending_group_ended(result) : result;
}

/* For a call of all ranks. Of nothing, which is nothing on all of them, NCCL makes no kernel, and we need
 * none. */
static scheduleComm_t *p2p_hold_whole(const void *comm, size_t count) {
  return count > 0 ? schedule_hold(comm) : NULL;
}

/* Every rank sends count elements to every other and itself, and receives as much. */
static int p2p_all(enum p2p_call call, const void *send, void *recv, size_t count, int type, void *comm,
                   void *stream) {
  p2p_all_fn original = (p2p_all_fn)p2p_original(call);
  trafficComm_t *record;
  scheduleComm_t *scheduled;
  const bool inside = p2pThread.isInside;
  int result;

  if (!original) return P2P_NCCL_INVALID_USAGE;
  if (p2p_is_early(comm)) return p2p_refused(P2P_NCCL_INVALID_ARGUMENT);
  record = p2p_record(comm);
  p2pThread.isInside = true;
  scheduled = p2p_hold_whole(comm, count);
  result = scheduled ? p2p_schedule_all(scheduled, send, recv, count, type, stream)
                     : original(send, recv, count, type, comm, stream);
  schedule_release(scheduled);
  p2pThread.isInside = inside;
  if (!p2p_issued(result)) return result;
  traffic_count_all_to_all(record, p2p_bytes(count, type));
  return result;
}

/* Every rank, the root itself included, sends count elements to the root (or receives them from it). */
static int p2p_rooted(enum p2p_call call, const void *send, void *recv, size_t count, int type, int root,
                      void *comm, void *stream) {
  const trafficDirection_t toRoot = call == P2P_GATHER ? TRAFFIC_SEND : TRAFFIC_RECV;
  const trafficDirection_t atRoot = call == P2P_GATHER ? TRAFFIC_RECV : TRAFFIC_SEND;
  p2p_rooted_fn original = (p2p_rooted_fn)p2p_original(call);
  trafficComm_t *record;
  scheduleComm_t *scheduled;
  const bool inside = p2pThread.isInside;
  int result, rank;

  if (!original) return P2P_NCCL_INVALID_USAGE;
  if (p2p_is_early(comm)) return p2p_refused(P2P_NCCL_INVALID_ARGUMENT);
  record = p2p_record(comm);
  p2pThread.isInside = true;
  scheduled = p2p_hold_whole(comm, count);
  if (!scheduled)
    result = original(send, recv, count, type, root, comm, stream);
  else if (P2P_LOAD(p2pCommUserRank)(comm, &rank) != P2P_NCCL_SUCCESS)
    result = P2P_NCCL_INVALID_ARGUMENT;
  else
    result =
        p2p_schedule_rooted(scheduled, call == P2P_GATHER ? send : recv, call == P2P_GATHER ? recv : send,
                            count, type, root, rank, stream, call == P2P_GATHER);
  schedule_release(scheduled);
  p2pThread.isInside = inside;
  if (!p2p_issued(result)) return result;
  traffic_count(record, toRoot, root, p2p_bytes(count, type));
  if (traffic_comm_rank(record) == root) traffic_count_all(record, atRoot, p2p_bytes(count, type));
  return result;
}

int p2p_alltoall(const void *send, void *recv, size_t count, int type, void *comm, void *stream) {
  return p2p_all(P2P_ALLTOALL, send, recv, count, type, comm, stream);
}

int p2p_all_to_all(const void *send, void *recv, size_t count, int type, void *comm, void *stream) {
  return p2p_all(P2P_ALL_TO_ALL, send, recv, count, type, comm, stream);
}

int p2p_gather(const void *send, void *recv, size_t count, int type, int root, void *comm, void *stream) {
  return p2p_rooted(P2P_GATHER, send, recv, count, type, root, comm, stream);
}

int p2p_scatter(const void *send, void *recv, size_t count, int type, int root, void *comm, void *stream) {
  return p2p_rooted(P2P_SCATTER, send, recv, count, type, root, comm, stream);
}

/* Before the original: after it another communicator may have got the same address. */
static int p2p_comm_end(enum p2p_call call, void *comm, void (*note)(const void *comm)) {
  p2p_comm_fn original = (p2p_comm_fn)p2p_original(call);
  int result;

  if (!original) return P2P_NCCL_INVALID_USAGE;
  if (!p2p_pending_end(comm, call == P2P_COMM_ABORT)) return P2P_NCCL_INVALID_ARGUMENT;
  schedule_comm_ends(comm, call == P2P_COMM_ABORT);
  note(comm);
  p2p_comm_gone(comm);
  p2p_pending_pass(true);
  result = original(comm);
  p2p_pending_pass(false);
  return result;
}

int p2p_comm_destroy(void *comm) {
  return p2p_comm_end(P2P_COMM_DESTROY, comm, p2p_comm_forget);
}

int p2p_comm_abort(void *comm) {
  return p2p_comm_end(P2P_COMM_ABORT, comm, p2p_comm_forget);
}

/* Ends what is under way on all ranks, and no operation may follow; children may. */
int p2p_comm_revoke(void *comm, int flags) {
  p2p_revoke_fn original = (p2p_revoke_fn)p2p_original(P2P_COMM_REVOKE);
  int result;

  if (!original) return P2P_NCCL_INVALID_USAGE;
  if (flags != 0) return original(comm, flags); /* refused */
  (void)p2p_pending_end(comm, true);
  schedule_comm_ends(comm, true);
  comm_id_end(comm);
  p2p_comm_gone(comm);
  p2p_pending_pass(true);
  result = original(comm, flags);
  p2p_pending_pass(false);
  return result;
}

/* No operation may follow it, so the record ends here already. */
int p2p_comm_finalize(void *comm) {
  return p2p_comm_end(P2P_COMM_FINALIZE, comm, comm_id_end);
}
