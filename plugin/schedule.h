/* ULTRAEP_P2P=schedule: sends and receives on communicators whose ranks share one domain do not go to NCCL,
 * but to one kernel of ours a group (kernels/p2p.h).
 *
 * Which communicators: decided once, when one is made, by all its ranks together, for all of them are in that
 * call: each says what it can do, then all make and map their windows, or none. So both ends of a transfer
 * always agree. A communicator that was made before the calls were taken over (the first one, by the call
 * that loads NCCL's plugins) or that is non-blocking is left to NCCL.
 *
 * Calls of a group are collected by thread and launched when its outermost group ends, after what NCCL itself
 * launches for it: for each communicator one kernel, on the stream of its first call; other streams of the
 * group are joined before and wait after. Launches on one communicator are ordered by an event, an external
 * one while a graph is captured, so that replays and other launches never overlap. */
#ifndef ULTRAEP_SCHEDULE_H_
#define ULTRAEP_SCHEDULE_H_

#include "kernel_p2p.h"

#include <stdbool.h>
#include <stdint.h>

typedef struct scheduleComm scheduleComm_t;

/* One send or receive as it was called. */
typedef struct {
  void *buffer;
  uint64_t bytes;
  void *stream;
  int32_t peer;
  bool isRecv;
} scheduleOp_t;

/* ---- schedule_group.c: collecting ---- */

/* The scheduled communicator; null: its calls are NCCL's. Any thread. */
scheduleComm_t *schedule_find(const void *comm);
/* Takes a call. depth: groups that the thread is in; outside one it is launched at once. Returns NCCL's
 * codes. */
int schedule_add(scheduleComm_t *comm, const scheduleOp_t *op, int depth);
/* The thread's outermost group has ended; launch: NCCL's part went well. */
int schedule_group_ended(bool launch);
/* Sorts ops[n] into lanes[2 * nRanks] by peer, a peer's sends and receives in order; sorted[n] and from[n],
 * where in ops each comes from. Returns the number of lanes. counts: [2 * nRanks] to work with. */
int schedule_lanes(const scheduleOp_t *ops, int n, int nRanks, kernelP2pLane_t *lanes, kernelP2pOp_t *sorted,
                   int32_t *from, int32_t *counts);

/* ---- schedule_comm.c: communicators; schedule_none.c where the library has no CUDA ---- */

/* Collective: the communicators, all ready, were made by one call or group of this thread. */
void schedule_comms_made(void *const *comms, int n);
/* The communicator ends: waits for what was launched, or with abort set ends it. */
void schedule_comm_ends(const void *comm, bool abort);
/* NCCL's code of what went wrong, 0 if nothing. */
int schedule_comm_error(const scheduleComm_t *comm);
int schedule_comm_ranks(const scheduleComm_t *comm);
int schedule_launch(scheduleComm_t *comm, const scheduleOp_t *ops, int n);

/* Called by schedule_comm.c. */
void schedule_add_comm(const void *handle, scheduleComm_t *comm);
scheduleComm_t *schedule_remove_comm(const void *handle);

#endif
