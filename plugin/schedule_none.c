/* In place of schedule_comm.c where the library has no CUDA. */
#include "schedule.h"

#include "p2p.h"
#include "settings.h"

#include <stdatomic.h>

bool schedule_is_wanted(void) {
  return false;
}

bool schedule_is_own_thread(void) {
  return false;
}

int schedule_comms_made(void *const *comms, scheduleSetup_t *const *setups, int n) {
  static atomic_flag told = ATOMIC_FLAG_INIT;

  (void)comms, (void)setups;
  if (n > 0 && settings_get()->p2p == SETTINGS_P2P_SCHEDULE && settings_tells_unscheduled() &&
      !atomic_flag_test_and_set(&told))
    settings_warn(
        "ULTRAEP_P2P=schedule: this library was built without CUDA; calls are counted and passed on");
  return P2P_NCCL_SUCCESS;
}

void schedule_comm_ends(const void *comm, bool abort) {
  (void)comm;
  (void)abort;
}

int schedule_comm_error(const scheduleComm_t *comm) {
  (void)comm;
  return P2P_NCCL_SUCCESS;
}

int schedule_comm_ranks(const scheduleComm_t *comm) {
  (void)comm;
  return 0;
}

int schedule_launch(scheduleComm_t *comm, const scheduleOp_t *ops, int n) {
  (void)comm;
  (void)ops;
  (void)n;
  return P2P_NCCL_INVALID_USAGE;
}
