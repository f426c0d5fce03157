/* The calls that make communicators: the originals, and each new communicator's id (comm_id.h). */
#include "comm_id.h"
#include "p2p.h"
#include "p2p_pending.h"
#include "schedule.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { COMM_NO_COLOUR = -1 };               /* of a split: the rank gets no communicator */
enum { COMM_SHRINK_ABORT = 1 };             /* a flag: first ends what is under way on the parent */
enum { COMM_KIND_SPLIT, COMM_KIND_SHRINK }; /* what a child's id is made of, besides the colour */

void p2p_comm_forget(const void *comm) {
  p2p_pending_forget(comm);
  comm_id_forget(comm);
}

int p2p_comm_async_error(void *comm, int *error) {
  p2p_error_fn original = (p2p_error_fn)p2p_original(P2P_COMM_ASYNC_ERROR);
  scheduleComm_t *scheduled;
  int result, own;

  if (!original) return P2P_NCCL_INVALID_USAGE;
  if (!error || p2p_pending_passes()) return original(comm, error);
  if (p2p_pending(comm)) {
    *error = P2P_NCCL_IN_PROGRESS;
    return P2P_NCCL_SUCCESS;
  }
  result = original(comm, error);
  if (result != P2P_NCCL_SUCCESS) return result;
  p2p_pending_seen(comm, *error);
  /* What ranks that did not meet have begun may stay in progress for ever. */
  if (*error != P2P_NCCL_SUCCESS && *error != P2P_NCCL_IN_PROGRESS) return result;
  scheduled = schedule_hold(comm);
  own = scheduled ? schedule_comm_error(scheduled) : P2P_NCCL_SUCCESS;
  if (own != P2P_NCCL_SUCCESS) *error = own;
  schedule_release(scheduled);
  return result;
}

/* ---- from unique ids ---- */
/* An older record at this address is another communicator's, whose end went unseen. */
static void comm_made(const void *comm, uint64_t id) {
  p2p_comm_gone(comm);
  comm_id_set(comm, id);
}

/* Before the call that makes it. Without ids there is no name that all ranks could give, and with
 * NCCL_COMM_ID all communicators have the same one. */
static attendance_t *comm_attend(const p2p_unique_id_t *ids, int nIds, int nRanks, int rank) {
  if (!p2p_counts() || !schedule_is_wanted() || p2p_sees_all()) return NULL;
  if (!ids || nIds <= 0 || getenv("NCCL_COMM_ID")) return attendance_open(0, 0, 0);
  return attendance_open(comm_id_hash((uint64_t)nRanks, ids, (size_t)nIds * sizeof(*ids)), nRanks, rank);
}

/* The handle is there at once, also in a group and from a non-blocking call. */
static int comm_made_by_ids(int result, const p2pMade_t *made, const p2p_unique_id_t *ids, int nIds,
                            int nRanks) {
  if (!p2p_counts() || !p2p_issued(result) || !made->place || !*made->place) {
    attendance_close(made->attendance);
    return result;
  }
  if (ids && nIds > 0)
    comm_made(*made->place, comm_id_hash((uint64_t)nRanks, ids, (size_t)nIds * sizeof(*ids)));
  return p2p_pending_made(made, 1, result);
}

int p2p_comm_init_rank(void **comm, int nRanks, p2p_unique_id_t id, int rank) {
  p2p_init_rank_fn original = (p2p_init_rank_fn)p2p_original(P2P_COMM_INIT_RANK);
  p2pMade_t made = {.place = comm, .waits = true};
  int result;

  if (!original) return P2P_NCCL_INVALID_USAGE;
  made.isNonBlocking = p2p_pending_non_blocking(NULL, NULL);
  made.attendance = comm_attend(&id, 1, nRanks, rank);
  p2p_pending_pass(true);
  result = original(comm, nRanks, id, rank);
  p2p_pending_pass(false);
  return comm_made_by_ids(result, &made, &id, 1, nRanks);
}

int p2p_comm_init_rank_config(void **comm, int nRanks, p2p_unique_id_t id, int rank, void *config) {
  p2p_init_rank_config_fn original = (p2p_init_rank_config_fn)p2p_original(P2P_COMM_INIT_RANK_CONFIG);
  p2pMade_t made = {.place = comm, .saysState = true};
  int result;

  if (!original) return P2P_NCCL_INVALID_USAGE;
  made.isNonBlocking = p2p_pending_non_blocking(config, NULL);
  made.attendance = comm_attend(&id, 1, nRanks, rank);
  p2p_pending_pass(true);
  result = original(comm, nRanks, id, rank, config);
  p2p_pending_pass(false);
  return comm_made_by_ids(result, &made, &id, 1, nRanks);
}

int p2p_comm_init_rank_scalable(void **comm, int nRanks, int rank, int nIds, const p2p_unique_id_t *ids,
                                void *config) {
  p2p_init_rank_scalable_fn original = (p2p_init_rank_scalable_fn)p2p_original(P2P_COMM_INIT_RANK_SCALABLE);
  p2pMade_t made = {.place = comm, .saysState = true};
  int result;

  if (!original) return P2P_NCCL_INVALID_USAGE;
  made.isNonBlocking = p2p_pending_non_blocking(config, NULL);
  made.attendance = comm_attend(ids, nIds, nRanks, rank);
  p2p_pending_pass(true);
  result = original(comm, nRanks, rank, nIds, ids, config);
  p2p_pending_pass(false);
  return comm_made_by_ids(result, &made, ids, nIds, nRanks);
}

/* All ranks are here, so any id will do that no other process has. */
static uint64_t comm_id_local(void) {
  static atomic_ullong count;
  struct {
    char host[64];
    long pid;
    unsigned long long count;
    struct timespec time;
  } bytes;

  memset(&bytes, 0, sizeof(bytes));
  (void)gethostname(bytes.host, sizeof(bytes.host));
  bytes.pid = (long)getpid();
  bytes.count = atomic_fetch_add(&count, 1);
  clock_gettime(CLOCK_REALTIME, &bytes.time);
  return comm_id_hash(0, &bytes, sizeof(bytes));
}

static int comm_all_made(int result, void **comms, int nDevices) {
  const uint64_t id = comm_id_local();
  const bool isNonBlocking = p2p_pending_non_blocking(NULL, NULL);
  p2pMade_t *made = calloc((size_t)nDevices, sizeof(*made));

  for (int i = 0; i < nDevices; i++) {
    comm_made(comms[i], id);
    if (made) made[i] = (p2pMade_t){.place = &comms[i], .isNonBlocking = isNonBlocking, .waits = true};
  }
  if (made)
    result = p2p_pending_made(made, nDevices, result);
  else if (schedule_is_wanted())
    result = P2P_NCCL_SYSTEM_ERROR;
  free(made);
  return result;
}

int p2p_comm_init_all(void **comms, int nDevices, const int *devices) {
  p2p_init_all_fn original = (p2p_init_all_fn)p2p_original(P2P_COMM_INIT_ALL);
  int result;

  if (!original) return P2P_NCCL_INVALID_USAGE;
  p2p_pending_pass(true);
  result = original(comms, nDevices, devices);
  p2p_pending_pass(false);
  if (!p2p_counts() || !p2p_issued(result)) return result;
  return comms && nDevices > 0 ? comm_all_made(result, comms, nDevices) : result;
}

/* ---- from other communicators ---- */
/* The handle may come later. A parent that is pending itself is refused, as NCCL refuses one in progress. */
int p2p_comm_split(void *parent, int colour, int key, void **comm, void *config) {
  p2p_split_fn original = (p2p_split_fn)p2p_original(P2P_COMM_SPLIT);
  p2pMade_t made = {.place = comm, .parent = parent};
  int result;

  if (!original) return P2P_NCCL_INVALID_USAGE;
  if (p2p_pending(parent)) return P2P_NCCL_INVALID_ARGUMENT;
  made.isNonBlocking = p2p_pending_non_blocking(config, parent);
  /* Ranks that get none are asked, too, so that all count alike. */
  made.id = comm_id_child(parent, (uint64_t)(uint32_t)colour << 8 | COMM_KIND_SPLIT);
  p2p_pending_pass(true);
  result = original(parent, colour, key, comm, config);
  p2p_pending_pass(false);
  if (!p2p_counts() || !comm || colour == COMM_NO_COLOUR) return result;
  return p2p_pending_made(&made, 1, result);
}

int p2p_comm_shrink(void *parent, int *excluded, int nExcluded, void **comm, void *config, int flags) {
  p2p_shrink_fn original = (p2p_shrink_fn)p2p_original(P2P_COMM_SHRINK);
  p2pMade_t made = {.place = comm, .parent = parent};
  int result;

  if (!original) return P2P_NCCL_INVALID_USAGE;
  if (p2p_pending(parent)) return P2P_NCCL_INVALID_ARGUMENT;
  made.isNonBlocking = p2p_pending_non_blocking(config, parent);
  made.id = comm_id_child(parent, COMM_KIND_SHRINK);
  /* Our kernels, too, may wait for a rank that is gone. */
  if (flags & COMM_SHRINK_ABORT) schedule_comm_ends(parent, true);
  p2p_pending_pass(true);
  result = original(parent, excluded, nExcluded, comm, config, flags);
  p2p_pending_pass(false);
  return p2p_counts() && comm ? p2p_pending_made(&made, 1, result) : result;
}

/* New ranks have the unique id alone, old ones the parent alone: no id of ours that both could compute. The
 * parent counts its child. All ranks of the new communicator are in this call, and its handle is there at
 * once: it says itself when it is ready. */
int p2p_comm_grow(void *parent, int nRanks, const p2p_unique_id_t *id, int rank, void **comm, void *config) {
  p2p_grow_fn original = (p2p_grow_fn)p2p_original(P2P_COMM_GROW);
  p2pMade_t made = {.place = comm};
  int result;

  if (!original) return P2P_NCCL_INVALID_USAGE;
  if (p2p_pending(parent)) return P2P_NCCL_INVALID_ARGUMENT;
  made.isNonBlocking = p2p_pending_non_blocking(config, parent);
  if (parent) (void)comm_id_child(parent, 0);
  p2p_pending_pass(true);
  result = original(parent, nRanks, id, rank, comm, config);
  p2p_pending_pass(false);
  if (!p2p_counts() || !p2p_issued(result)) return result;
  if (!comm || !*comm) return result;
  comm_made(*comm, 0);
  made.attendance = comm_attend(NULL, 0, nRanks, rank); /* a new rank's call may have been missed */
  return p2p_pending_made(&made, 1, result);
}
