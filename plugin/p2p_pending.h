/* Communicators between the call that makes them and the moment when the program may use them.
 *
 * A call that blocks, or the end of a group of such calls, returns when NCCL has made the communicator on all
 * ranks: schedule.h's set-up, for which all ranks must meet, follows at once and the program waits for it.
 *
 * One that does not block returns before. Then, with ULTRAEP_P2P=schedule, a thread of ours asks NCCL until
 * the communicator is there and sets it up; until that has ended, well or not, we answer ncclInProgress in
 * NCCL's place, and refuse calls as NCCL does. So a program that asks several communicators in any order
 * never waits for a rank that it has not come to, and a rank whose program asks late keeps no other waiting.
 * Whom to ask: a child of another communicator is there when its parent says so, others say it themselves.
 *
 * NCCL itself asks by the name of ncclCommGetAsyncError whether a communicator may be used, which leads to us
 * where we are preloaded. The program's calls it thus refuses, too; those made for us must pass:
 * p2p_pending_passes.
 *
 * Without scheduling there is no thread, and nothing is refused; a child's id (comm_id.h) is noted when the
 * program sees that it is there. */
#ifndef ULTRAEP_P2P_PENDING_H_
#define ULTRAEP_P2P_PENDING_H_

#include "attendance.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* What a call has made or will make. */
typedef struct {
  void **place;             /* where the handle is or, with a parent, will be */
  void *parent;             /* that says when it is there; null: the handle is there at once */
  uint64_t id;              /* to be noted when it is there; 0: none */
  bool isNonBlocking;       /* the new communicator, by its config */
  bool waits;               /* outside of groups the call waits for all ranks, whatever the config says */
  bool saysState;           /* the call's result is the communicator's state, which may be success at once */
  attendance_t *attendance; /* the receiver's from now on; only where it is full are ranks to meet */
} p2pMade_t;

/* Whether a communicator with that ncclConfig_t does not block. parent: whose config it has where it has
 * none; null: none. */
bool p2p_pending_non_blocking(const void *config, const void *parent);
/* A call has returned result; n communicators, each with its own `made`. Returns what the program is told. */
int p2p_pending_made(const p2pMade_t *made, int n, int result);
extern atomic_int p2pPendingCount; /* so that without any a call costs one load */
/* The thread's outermost group has ended. Returns what the program is told. */
int p2p_pending_group_check(int result);
static inline int p2p_pending_group_ended(int result) {
  return atomic_load_explicit(&p2pPendingCount, memory_order_relaxed) > 0 ? p2p_pending_group_check(result)
                                                                          : result;
}

/* Whether the program is to be told that the communicator is in progress, and refused its calls. */
bool p2p_pending_find(const void *comm);
static inline bool p2p_pending(const void *comm) {
  /* What a set-up has done is seen by whom it is over for. */
  return atomic_load_explicit(&p2pPendingCount, memory_order_acquire) > 0 && p2p_pending_find(comm);
}
/* NCCL's state of the communicator, as the program sees it. */
void p2p_pending_seen(const void *comm, int state);
/* The communicator, a parent or a child, ends: waits until it is not pending. False where NCCL has not made
 * it yet, which only an abort can end. */
bool p2p_pending_end(const void *comm, bool abort);
void p2p_pending_forget(const void *comm);

/* Between them, what NCCL asks in this thread is not the program's question. */
void p2p_pending_pass(bool begins);
bool p2p_pending_passes(void);

#endif
