/* What stands in for schedule_comm.c in tests without GPUs, and opens that to them. A set-up does what the
 * real one does as seen from NCCL: it calls NCCL from a thread of its own and polls, meets the other ranks,
 * can be held, fail and be aborted. */
#ifndef ULTRAEP_TESTS_SCHEDULE_DOUBLE_H_
#define ULTRAEP_TESTS_SCHEDULE_DOUBLE_H_

#include <stdatomic.h>
#include <stdbool.h>

struct schedule_double {
  /* What is wanted: set-ups wait after the ranks have met; this rank cannot (-1: all can); launches fail with
   * that code. */
  atomic_bool isHeld;
  atomic_int failingRank, launchResult;
  /* What there is: set-ups under way, of them those that are being held; communicators that were set up,
   * could not be, were aborted meanwhile; that ended, of them by an abort; operations launched, and how many
   * calls of NCCL there had been at the last launch. */
  atomic_int running, held;
  atomic_int made, failed, aborted, ended, endedByAbort;
  atomic_long launched, callsBefore;
  bool (*isScheduled)(const void *comm);
};
extern struct schedule_double scheduleDouble;

#endif
