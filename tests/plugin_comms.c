/* Communicators under the calls that are taken over: which communicator it is that an operation belongs to,
 * and what gather, scatter and one-sided puts count as. The fake NCCL, a client, and the plugin's code with a
 * record in place of the traffic record. */
#include "takeover_common.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>

#include <cmocka.h>

/* Gather, scatter and a one-sided put count as the sends and receives that they are. */
static void check_rooted(const struct client *from, int rank, int root) {
  struct record_sums sums;
  int buffer[2], stream;
  void *comm;

  record->clear();
  assert_int_equal(from->init(&comm, 4, commId, rank), 0);
  assert_int_equal(from->gather(&buffer[0], &buffer[1], 3, FLOAT32, root, comm, &stream), 0);
  assert_string_equal(nccl->last.name, "ncclGather");
  assert_true(nccl->last.send == &buffer[0] && nccl->last.recv == &buffer[1] && nccl->last.count == 3);
  assert_true(nccl->last.type == FLOAT32 && nccl->last.peer == root && nccl->last.stream == &stream);
  sums = record->sums();
  for (int peer = 0; peer < 4; peer++) {
    assert_true(sums.bytes[SEND][peer] == (peer == root ? 12 : 0));
    assert_true(sums.bytes[RECV][peer] == (rank == root ? 12 : 0));
    assert_int_equal(sums.calls[SEND][peer] + sums.calls[RECV][peer], (peer == root) + (rank == root));
  }
  record->clear();
  assert_int_equal(from->scatter(&buffer[0], &buffer[1], 5, 8, root, comm, &stream), 0);
  assert_string_equal(nccl->last.name, "ncclScatter");
  assert_true(nccl->last.count == 5 && nccl->last.peer == root && nccl->last.comm == comm);
  sums = record->sums();
  for (int peer = 0; peer < 4; peer++) {
    assert_true(sums.bytes[SEND][peer] == (rank == root ? 40 : 0));
    assert_true(sums.bytes[RECV][peer] == (peer == root ? 40 : 0));
  }
  record->clear();
  assert_int_equal(from->putSignal(&buffer[0], 9, 0, 2, NULL, 64, 0, 0, 0, comm, &stream), 0);
  assert_string_equal(nccl->last.name, "ncclPutSignal");
  assert_true(nccl->last.count == 9 && nccl->last.peer == 2 && nccl->last.stream == &stream);
  assert_true(record->sums().bytes[SEND][2] == 9);
  nccl->result = 3;
  assert_int_equal(from->gather(NULL, NULL, 1, 0, root, comm, NULL), 3);
  assert_int_equal(from->scatter(NULL, NULL, 1, 0, root, comm, NULL), 3);
  assert_int_equal(from->putSignal(NULL, 1, 0, 2, NULL, 0, 0, 0, 0, comm, NULL), 3);
  nccl->result = 0;
  assert_int_equal(record->sums().calls[SEND][2], 1);
  assert_int_equal(record->sums().calls[RECV][root], 0);
  assert_int_equal(from->destroy(comm), 0);
}

static void test_rooted(void **state) {
  const struct client *from = client_open("now");

  (void)state;
  start();
  check_rooted(from, 1, 1);
  check_rooted(from, 1, 3);
}

/* ---- which communicator: all of its ranks, wherever they are, have one id, and no others do ---- */
/* The id that the record is opened with at the first operation. */
static uint64_t id_of(const struct client *from, void *comm) {
  const long opened = record->sums().opened;

  assert_int_equal(from->send(NULL, 1, 0, 0, comm, NULL), 0);
  assert_int_equal(record->sums().opened, opened + 1);
  return record->sums().hash;
}

static uint64_t id_end(const struct client *from, void *comm) {
  const uint64_t id = id_of(from, comm);

  assert_int_equal(from->destroy(comm), 0);
  return id;
}

static void test_ids(void **state) {
  const struct client *from = client_open("now");
  fake_id ids[2] = {commId, {"another"}};
  uint64_t id, other;
  void *comms[3];

  (void)state;
  assert_int_equal(from->init(&comms[0], 4, commId, 1), 0);
  start();
  assert_true(id_end(from, comms[0]) == 0); /* made before */
  assert_int_equal(from->init(&comms[0], 4, commId, 0), 0);
  assert_int_equal(from->init(&comms[1], 4, commId, 3), 0);
  id = id_end(from, comms[0]);
  assert_true(id != 0 && id_end(from, comms[1]) == id);
  assert_int_equal(from->initConfig(&comms[0], 4, commId, 2, NULL), 0);
  assert_true(id_end(from, comms[0]) == id);
  assert_int_equal(from->initConfig(&comms[0], 4, ids[1], 2, NULL), 0);
  other = id_end(from, comms[0]);
  assert_true(other != 0 && other != id);
  for (int rank = 0; rank < 2; rank++)
    assert_int_equal(from->initScalable(&comms[rank], 4, rank, 2, ids, NULL), 0);
  id = id_end(from, comms[0]);
  assert_true(id != 0 && id != other && id_end(from, comms[1]) == id);
  assert_int_equal(from->initAll(comms, 3, NULL), 0);
  id = id_end(from, comms[0]);
  assert_true(id != 0 && id_end(from, comms[1]) == id && id_end(from, comms[2]) == id);
  assert_int_equal(from->initAll(comms, 2, NULL), 0);
  assert_true(id_end(from, comms[0]) != id && id_end(from, comms[1]) != id);
  nccl->result = 2; /* no communicator, nothing to note */
  comms[0] = NULL;
  assert_int_equal(from->init(&comms[0], 4, commId, 0), 2);
  nccl->result = 0;
}

/* Two ranks do the same; each split of a parent is another communicator. */
static void test_id_children(void **state) {
  const struct client *from = client_open("now");
  uint64_t ids[2][6];
  void *parents[2], *child, *grandchild;

  (void)state;
  start();
  nccl->childRanks = 2;
  for (int rank = 0; rank < 2; rank++) {
    nccl->childRank = rank;
    assert_int_equal(from->init(&parents[rank], 4, commId, rank), 0);
    assert_int_equal(from->split(parents[rank], 7, 0, &child, NULL), 0);
    assert_int_equal(from->split(child, 7, 0, &grandchild, NULL), 0);
    ids[rank][0] = id_end(from, child);
    ids[rank][1] = id_end(from, grandchild);
    assert_int_equal(from->split(parents[rank], FAKE_NO_COLOUR, 0, &child, NULL), 0);
    assert_null(child);
    assert_int_equal(from->split(parents[rank], 7, 0, &child, NULL), 0);
    ids[rank][2] = id_end(from, child);
    assert_int_equal(from->shrink(parents[rank], NULL, 0, &child, NULL, 0), 0);
    ids[rank][3] = id_end(from, child);
    assert_int_equal(from->grow(parents[rank], 6, NULL, -1, &child, NULL), 0);
    assert_true(id_end(from, child) == 0); /* its ranks do not all know the same */
    assert_int_equal(from->split(parents[rank], 0, 0, &child, NULL), 0);
    ids[rank][4] = id_end(from, child);
    ids[rank][5] = id_end(from, parents[rank]);
  }
  assert_memory_equal(ids[0], ids[1], sizeof(ids[0]));
  for (int i = 0; i < 6; i++) {
    assert_true(ids[0][i] != 0);
    for (int j = 0; j < i; j++) assert_true(ids[0][i] != ids[0][j]);
  }
  nccl->childRanks = 1;
  nccl->childRank = 0;
}

/* In a group the children are there at its end; ranks of another colour get another communicator. */
static void test_id_children_grouped(void **state) {
  const struct client *from = client_open("now");
  void *parents[2], *children[2], *plain;
  uint64_t ids[2];

  (void)state;
  start();
  for (int i = 0; i < 2; i++) assert_int_equal(from->init(&parents[i], 4, commId, i), 0);
  assert_int_equal(from->groupStart(), 0);
  assert_int_equal(from->groupStart(), 0);
  for (int i = 0; i < 2; i++) assert_int_equal(from->split(parents[i], 3, 0, &children[i], NULL), 0);
  assert_int_equal(from->groupEnd(), 0);
  assert_null(children[0]);
  assert_int_equal(from->groupEnd(), 0);
  assert_non_null(children[0]);
  ids[0] = id_end(from, children[0]);
  assert_true(ids[0] != 0 && id_end(from, children[1]) == ids[0]);
  assert_int_equal(from->groupStart(), 0);
  for (int i = 0; i < 2; i++) assert_int_equal(from->split(parents[i], i, 0, &children[i], NULL), 0);
  assert_int_equal(from->init(&plain, 4, commId, 2), 0);
  assert_int_equal(from->groupEnd(), 0);
  for (int i = 0; i < 2; i++) ids[i] = id_end(from, children[i]);
  assert_true(ids[0] != 0 && ids[1] != 0 && ids[0] != ids[1]);
  assert_true(id_end(from, plain) == id_of(from, parents[0]));
  /* A group that fails has made none. */
  assert_int_equal(from->groupStart(), 0);
  assert_int_equal(from->split(parents[0], 3, 0, &children[0], NULL), 0);
  nccl->result = 5;
  assert_int_equal(from->groupEnd(), 5);
  nccl->result = 0;
  if (children[0]) assert_true(id_end(from, children[0]) == 0);
  for (int i = 0; i < 2; i++) assert_int_equal(from->destroy(parents[i]), 0);
}

static void wait_ready(const struct client *from, void *comm) {
  int error = FAKE_IN_PROGRESS;

  while (error == FAKE_IN_PROGRESS) assert_int_equal(from->asyncError(comm, &error), 0);
  assert_int_equal(error, 0);
}

/* A communicator that does not block is in progress after each call, and then says nothing of itself. */
static void test_non_blocking(void **state) {
  const struct client *from = client_open("now");
  struct fake_config config = FAKE_CONFIG(0);
  void *parent, *child, *plain;
  uint64_t id;

  (void)state;
  start();
  assert_int_equal(from->init(&plain, 4, commId, 0), 0);
  id = id_end(from, plain);
  assert_int_equal(from->initConfig(&parent, 4, commId, 1, &config), FAKE_IN_PROGRESS);
  wait_ready(from, parent);
  record->clear();
  assert_int_equal(from->send(NULL, 6, FLOAT32, 2, parent, NULL), FAKE_IN_PROGRESS);
  assert_true(record->sums().hash == id);
  assert_true(record->sums().bytes[SEND][2] == 24);
  wait_ready(from, parent);
  assert_int_equal(from->allToAll(NULL, NULL, 1, FLOAT32, parent, NULL), FAKE_IN_PROGRESS);
  assert_true(record->sums().bytes[SEND][2] == 28);
  wait_ready(from, parent);
  assert_int_equal(from->split(parent, 3, 0, &child, NULL), FAKE_IN_PROGRESS);
  assert_null(child);
  wait_ready(from, parent);
  assert_non_null(child);
  assert_int_equal(from->send(NULL, 1, 0, 0, child, NULL), FAKE_IN_PROGRESS);
  assert_true(record->sums().hash != 0 && record->sums().hash != id);
  assert_int_equal(from->destroy(child), 0);
  /* In a group, which ends before the child is there. */
  assert_int_equal(from->groupStart(), 0);
  assert_int_equal(from->split(parent, 3, 0, &child, NULL), FAKE_IN_PROGRESS);
  assert_int_equal(from->groupEnd(), FAKE_IN_PROGRESS);
  assert_null(child);
  wait_ready(from, parent);
  id = record->sums().hash;
  assert_int_equal(from->send(NULL, 1, 0, 0, child, NULL), FAKE_IN_PROGRESS);
  assert_true(record->sums().hash != 0 && record->sums().hash != id);
  assert_int_equal(from->destroy(child), 0);
  /* As NCCL does: success, and the child is not there yet. */
  nccl->lateSuccess = 1;
  wait_ready(from, parent);
  assert_int_equal(from->split(parent, 3, 0, &child, NULL), 0);
  assert_null(child);
  wait_ready(from, parent);
  nccl->lateSuccess = 0;
  id = record->sums().hash;
  assert_int_equal(from->send(NULL, 1, 0, 0, child, NULL), FAKE_IN_PROGRESS);
  assert_true(record->sums().hash != 0 && record->sums().hash != id);
  assert_int_equal(from->destroy(child), 0);
  /* Given up before it is there. */
  assert_int_equal(from->split(parent, 3, 0, &child, NULL), FAKE_IN_PROGRESS);
  assert_int_equal(from->abort(parent), 0);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_setup(test_rooted, test_setup),
      cmocka_unit_test_setup(test_ids, test_setup),
      cmocka_unit_test_setup(test_id_children, test_setup),
      cmocka_unit_test_setup(test_id_children_grouped, test_setup),
      cmocka_unit_test_setup(test_non_blocking, test_setup),
  };

  return cmocka_run_group_tests(tests, group_setup, NULL);
}
