/* ULTRAEP_P2P=schedule under a real NCCL: how communicators begin and end. Split and grown ones, one that a
 * rank's library has not seen, calls from threads on other devices, ends with and without abort, many after
 * one another. */
#include "gpu_schedule_ranks.h"

#include <time.h>

/* A communicator split off, two used in one group; a part of the ranks in another. */
static void split_work(rank_t *self) {
  void *twin = NULL, *half = NULL;
  CALL(self, p2p_comm_split(self->comm, 0, self->rank, &twin, NULL));
  ready(self, self->comm);
  CHECK(self, schedule_is_scheduled(twin), "the twin is not scheduled");
  meet();
  CALL(self, p2p_group_start());
  CALL(self, p2p_comm_split(self->comm, self->rank % 2, self->rank, &half, NULL));
  CALL(self, p2p_group_end());
  ready(self, self->comm);
  CHECK(self, schedule_is_scheduled(half), "the half is not scheduled");
  meet();
  self->round = 7;
  fill(self);
  meet();
  CALL(self, p2p_group_start());
  exchange(self, twin, false);
  CALL(self, p2p_send(self->send, 0, TYPE_INT8, self->rank / 2, half, self->streams[1]));
  CALL(self, p2p_recv(self->recv, 0, TYPE_INT8, self->rank / 2, half, self->streams[1]));
  CALL(self, p2p_group_end());
  verify(self);
  meet();
  CALL(self, p2p_comm_destroy(half));
  meet();
  CALL(self, p2p_comm_destroy(twin));
}

static void test_split(void **state) {
  (void)state;
  run(4, true, split_work);
}

/* The first half of the ranks has a communicator, which grows by the others. */
static void grow_work(rank_t *self) {
  const bool isOld = self->rank < self->nRanks / 2;
  void *old = NULL, *grown = NULL;
  CALL(self, p2p_comm_split(self->comm, isOld ? 0 : -1, self->rank, &old, NULL));
  ready(self, self->comm);
  if (self->rank == 0) CALL(self, world.commGetUniqueId(old, &world.id));
  meet();
  CALL(self,
       p2p_comm_grow(old, self->nRanks, isOld ? NULL : &world.id, isOld ? -1 : self->rank, &grown, NULL));
  if (grown) ready(self, grown);
  CHECK(self, schedule_is_scheduled(grown), "the grown communicator is not scheduled: %s",
        ultraepGetLastError());
  meet();
  self->round = 9;
  exchange_checked(self, grown, true);
  if (grown) CALL(self, p2p_comm_destroy(grown));
  meet();
  if (old) CALL(self, p2p_comm_destroy(old));
}

static void test_grow(void **state) {
  (void)state;
  if (!world.commGetUniqueId) skip();
  sees_all(true);
  run(4, true, grow_work);
  sees_all(false);
}

/* By the call that makes the communicator a rank's NCCL may load the plugin, so that it does not pass here:
 * then no rank waits for that one, and NCCL has the communicator. */
static void unseen_work(rank_t *self) {
  static p2p_unique_id_t id;
  p2p_init_rank_fn original = (p2p_init_rank_fn)p2p_original(P2P_COMM_INIT_RANK);
  void *comm = NULL;
  if (self->rank == 0) CALL(self, world.getUniqueId(&id));
  meet();
  if (self->rank == 1) CALL(self, p2p_group_start());
  if (self->rank == 2)
    CALL(self, original(&comm, self->nRanks, id, self->rank));
  else
    CALL(self, p2p_comm_init_rank(&comm, self->nRanks, id, self->rank));
  if (self->rank == 1) CALL(self, p2p_group_end());
  ready(self, comm);
  CHECK(self, !schedule_is_scheduled(comm), "it is scheduled, though not on rank 2");
  self->round = 6;
  exchange_checked(self, comm, false);
  if (comm) CALL(self, p2p_comm_destroy(comm));
}

static void test_unseen(void **state) {
  (void)state;
  run(4, true, unseen_work);
}

/* Without a name to ask for, ranks wait for one that does not come: it is said, and the communicator is no
 * good but can be ended. */
static void lost_work(rank_t *self) {
  static p2p_unique_id_t id;
  p2p_init_rank_fn original = (p2p_init_rank_fn)p2p_original(P2P_COMM_INIT_RANK);
  void *comm = NULL;
  int state = P2P_NCCL_IN_PROGRESS, error = 0;
  if (self->rank == 0) CALL(self, world.getUniqueId(&id));
  meet();
  if (self->rank == 2)
    CALL(self, original(&comm, self->nRanks, id, self->rank));
  else
    state = p2p_comm_init_rank(&comm, self->nRanks, id, self->rank);
  while (self->rank != 2 && state == P2P_NCCL_IN_PROGRESS) {
    nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    if (p2p_comm_async_error(comm, &state) != 0) state = -1;
  }
  if (self->rank != 2) {
    CHECK(self, state == P2P_NCCL_REMOTE_ERROR, "it is made: %d", state);
    CHECK(self, comm, "there is nothing to end");
    CHECK(self, p2p_comm_async_error(comm, &error) == 0 && error == P2P_NCCL_REMOTE_ERROR, "its state is %d",
          error);
    CHECK(self, p2p_send(self->send, 100, TYPE_INT8, 1, comm, self->streams[0]) == P2P_NCCL_REMOTE_ERROR,
          "it is not refused");
  }
  meet();
  if (comm) CALL(self, p2p_comm_abort(comm));
  meet();
  self->round = 8;
  exchange_checked(self, self->comm, false);
}

static void test_lost(void **state) {
  const char *timeout = getenv("ULTRAEP_P2P_TIMEOUT_MS");
  (void)state;
  if (!timeout || atoi(timeout) > 10000) skip();
  sees_all(true);
  run(4, true, lost_work);
  sees_all(false);
}

/* Rank 1 waits for the others, who leave. */
static void left_behind(rank_t *self, void *comm) {
  int error = 0;
  if (self->rank == 1) CALL(self, p2p_recv(self->recv, 1000, TYPE_INT8, 0, comm, self->streams[0]));
  meet();
  if (self->rank == 1) {
    CHECK(self, stream_ends(self->streams[0], 20), "it still waits for a rank that has left");
    CALL(self, p2p_comm_async_error(comm, &error));
    CHECK(self, error != 0 && error != P2P_NCCL_IN_PROGRESS, "nothing is said of a rank that has left");
    CALL(self, p2p_comm_abort(comm));
  } else {
    CALL(self, p2p_comm_destroy(comm));
  }
  meet();
}

/* Calls from a thread on another device, which it stays on. */
static void away_work(rank_t *self) {
  void *twin = NULL;
  int home = -1, away = -1, nDevices = 1;
  CALL(self, cudaGetDeviceCount(&nDevices));
  CALL(self, cudaGetDevice(&home));
  CALL(self, cudaSetDevice((home + 1) % nDevices));
  CALL(self, p2p_comm_split(self->comm, 0, self->rank, &twin, NULL));
  ready(self, self->comm);
  CHECK(self, schedule_is_scheduled(twin), "the twin is not scheduled: %s", ultraepGetLastError());
  for (self->round = 10; self->round < 14; self->round++)
    exchange_checked(self, self->round % 2 ? twin : self->comm, self->round > 11);
  left_behind(self, twin);
  CALL(self, cudaGetDevice(&away));
  CHECK(self, away == (home + 1) % nDevices, "the current device is %d now", away);
  CALL(self, cudaSetDevice(home));
}

static void test_away(void **state) {
  int nDevices = 1;
  (void)state;
  GPU_OK(cudaGetDeviceCount(&nDevices));
  if (nDevices < 2) skip();
  run(4, true, away_work);
}

/* Rank 0 waits for one that does not come, and aborts. */
static void abort_work(rank_t *self) {
  if (self->rank == 0) CALL(self, p2p_recv(self->recv, 1000, TYPE_INT8, 1, self->comm, self->streams[0]));
  meet();
  if (self->rank == 0) {
    CHECK(self, !stream_ends(self->streams[0], 1), "it did not wait");
    CALL(self, p2p_comm_abort(self->comm));
    CHECK(self, stream_ends(self->streams[0], 20), "the kernel does not leave");
  }
  meet();
  if (self->rank != 0) CALL(self, p2p_comm_abort(self->comm));
  self->comm = NULL;
}

static void test_abort(void **state) {
  (void)state;
  run(2, true, abort_work);
}

/* One that no other rank joins is given up while NCCL makes it; the others are as before. */
static void early_work(rank_t *self) {
  p2p_unique_id_t id;
  void *lonely = NULL;
  int state = 0;
  self->round = 2;
  CALL(self, world.getUniqueId(&id));
  CALL(self, p2p_comm_init_rank_config(&lonely, self->nRanks, id, self->rank, NULL));
  CALL(self, p2p_comm_async_error(lonely, &state));
  CHECK(self, state == P2P_NCCL_IN_PROGRESS, "the state is %d", state);
  CHECK(self, p2p_send(self->send, 1, TYPE_INT8, 0, lonely, self->streams[0]) == P2P_NCCL_INVALID_ARGUMENT,
        "it was not refused");
  CALL(self, p2p_comm_abort(lonely));
  exchange_checked(self, self->comm, false);
}

static void test_early(void **state) {
  (void)state;
  if (!world.isLater) skip();
  run(2, true, early_work);
}

static void nothing_work(rank_t *self) {
  self->round = 1;
  exchange_checked(self, self->comm, false);
}

static void test_again(void **state) {
  size_t before = 0, after = 0, all;
  (void)state;
  for (int i = 0; i < 12; i++) {
    run(2, i % 2, nothing_work);
    if (i == 3) GPU_OK(cudaMemGetInfo(&before, &all));
  }
  GPU_OK(cudaMemGetInfo(&after, &all));
  print_message("8 communicators more: %lld bytes\n", (long long)before - (long long)after);
  assert_true(before < after + ((size_t)16 << 20));
}

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_split),  cmocka_unit_test(test_grow),
                                     cmocka_unit_test(test_unseen), cmocka_unit_test(test_lost),
                                     cmocka_unit_test(test_early),  cmocka_unit_test(test_abort),
                                     cmocka_unit_test(test_again),  cmocka_unit_test(test_away)};
  int status = ranks_begin(argc, argv);
  return status != 0 ? status : cmocka_run_group_tests_name("gpu_schedule_comms", tests, NULL, NULL);
}
