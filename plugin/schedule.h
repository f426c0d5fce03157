/* ULTRAEP_P2P=schedule, the default: sends and receives on communicators whose ranks share one domain do not
 * go to NCCL, but to one kernel of ours a group (kernels/kernel_p2p.h).
 *
 * Which communicators: decided once, when one is made, by all its ranks together, for all of them are in that
 * call: each says what it can do, then all make and map their windows, or none. So both ends of a transfer
 * always agree. Where the call that makes it does not wait for the others, neither does the set-up
 * (p2p_pending.h). A communicator whose making was not seen on every rank (by a process's first one NCCL
 * loads its plugins) is left to NCCL (attendance.h). So are those of more than 128 ranks and, unless
 * ULTRAEP_P2P is set, all under NCCL before 2.29.
 *
 * Calls of a group are collected by thread and launched when its outermost group ends, before NCCL launches
 * its own part of it: then the order is the same on all ranks, also where NCCL does its part later, in a
 * thread, and a part of NCCL's that fails on one rank leaves no peer waiting for ours. For each communicator
 * one kernel, on the stream of its first call; other streams of the group are joined before and wait after.
 * Launches on one communicator are ordered by an event, an external one while a graph is captured, so that
 * replays and other launches never overlap. */
#ifndef ULTRAEP_SCHEDULE_H_
#define ULTRAEP_SCHEDULE_H_

#include "kernel_p2p.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct scheduleComm scheduleComm_t;

/* At the head of each scheduleComm. */
typedef struct scheduleUse {
  const void *handle; /* NCCL's */
  uint64_t number;    /* that no other has */
  atomic_int users;   /* calls: it is not freed under one while another thread ends the communicator */
  struct scheduleUse *next;
} scheduleUse_t;

/* One send or receive as it was called. */
typedef struct {
  void *buffer;
  uint64_t bytes;
  void *stream;
  int32_t peer;
  bool isRecv;
} scheduleOp_t;

/* ---- schedule_group.c: which communicators, and collecting ---- */

/* The scheduled communicator, which stays until it is released; null: its calls are NCCL's. Any thread. */
extern atomic_int scheduleCount; /* so that without any the data path costs one load */
scheduleComm_t *schedule_hold_find(const void *handle);
static inline scheduleComm_t *schedule_hold(const void *handle) {
  return atomic_load_explicit(&scheduleCount, memory_order_acquire) > 0 ? schedule_hold_find(handle) : NULL;
}
static inline void schedule_release(scheduleComm_t *comm) {
  if (comm) atomic_fetch_sub(&((scheduleUse_t *)comm)->users, 1);
}
bool schedule_is_scheduled(const void *handle);
/* Takes a call; the caller holds the communicator. depth: groups that the thread is in; outside one it is
 * launched at once. Returns NCCL's codes. */
int schedule_add(scheduleComm_t *comm, const scheduleOp_t *op, int depth);
/* The thread's outermost group ends; launch: none of its calls was refused. */
int schedule_group_ended(bool launch);
/* Sorts ops[n] into lanes[2 * nRanks] by peer, a peer's sends and receives in order; sorted[n] and from[n],
 * where in ops each comes from. Returns the number of lanes. counts: [2 * nRanks] to work with. */
int schedule_lanes(const scheduleOp_t *ops, int n, int nRanks, kernelP2pLane_t *lanes, kernelP2pOp_t *sorted,
                   int32_t *from, int32_t *counts);

/* Of a communicator that is being set up: how to end that early. */
typedef struct {
  pthread_mutex_t lock;
  bool isAborted;
  volatile int32_t *abort; /* to be set to 1, while it is there */
} scheduleSetup_t;

void schedule_setup_init(scheduleSetup_t *setup);
/* The set-up looks at *abort from now on; null: no more. setup may be null. */
void schedule_setup_watch(scheduleSetup_t *setup, volatile int32_t *abort);
/* Any thread. */
void schedule_setup_abort(scheduleSetup_t *setup);
bool schedule_setup_is_aborted(scheduleSetup_t *setup); /* not where setup is null */

/* ---- schedule_comm.c: communicators; schedule_none.c where the library has no CUDA ---- */

/* Whether communicators are to be scheduled where they can. */
bool schedule_is_wanted(void);
/* Collective: the communicators, all ready, were made by one call or group. setups: [n], or null. Returns
 * NCCL's code, not success where one is lost: a rank that should have met the others did not, and what they
 * have begun on it together stays. Calls on such a one are refused, unless there was no memory even to note
 * it. */
int schedule_comms_made(void *const *comms, scheduleSetup_t *const *setups, int n);
/* Whether the calling thread makes NCCL's calls for us: what it asks NCCL is not the program's question. */
bool schedule_is_own_thread(void);
/* The communicator ends: waits for what was launched, or with abort set ends it. */
void schedule_comm_ends(const void *comm, bool abort);
/* NCCL's code of what went wrong, 0 if nothing. */
int schedule_comm_error(const scheduleComm_t *comm);
int schedule_comm_ranks(const scheduleComm_t *comm);
int schedule_launch(scheduleComm_t *comm, const scheduleOp_t *ops, int n);

/* Called by schedule_comm.c. */
void schedule_add_comm(const void *handle, scheduleComm_t *comm);
/* No call finds it any more; some may still be using it. */
scheduleComm_t *schedule_remove_comm(const void *handle);
void schedule_wait_unused(scheduleComm_t *comm);

#endif
