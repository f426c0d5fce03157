/* The whole library under a fake NCCL that loads it as tuner, as profiler, or as both: random calls of
 * several threads against a simple model of what must be counted, and many communicators. ctest sets which
 * roles, and ROLES_COUNT to who is to count: calls (those taken over alone), events (the profiler alone),
 * both, or none. */
#include "sanitized.h"
#include "takeover_common.h"
#include "ultraep.h"

#include <dlfcn.h>
#include <malloc.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { RANKS = 9, COMMS = 6, THREADS = 4, DEPTH = 3 };
enum { ACTIONS = SANITIZED ? 4000 : 20000, MANY = SANITIZED ? 2000 : 10000 };

typedef int64_t row_t[RANKS];

/* What must have been counted for one rank of a communicator. */
struct model {
  void *comm;
  int rank, nRanks;
  row_t bytes[2], calls[2];
};

struct worker {
  pthread_t thread;
  uint64_t random;
  struct model models[COMMS];
  int depth;
  bool isAlone;          /* the only thread: NCCL may fail for it */
  void *children[COMMS]; /* asked for in the group */
  char error[300];
};

static bool calls, events;
static const struct client *hooked;
static struct client direct; /* past the slots, as those who use dlsym */
static ultraepResult_t (*trafficGet)(ncclComm_t comm, ultraepTraffic_t *traffic);
static uint64_t (*hashOf)(const void *comm);
static void *(*contextOf)(const void *comm);

/* ---- the model ---- */
static void model_add(struct model *model, int direction, int peer, int64_t bytes) {
  if (peer < 0 || peer >= model->nRanks) return;
  model->bytes[direction][peer] += bytes;
  model->calls[direction][peer]++;
}

static bool model_is(const row_t counted, const row_t expected, int nRanks) {
  return memcmp(counted, expected, (size_t)nRanks * sizeof(counted[0])) == 0;
}

/* Nothing is recorded before the first operation. */
static bool model_is_empty(const struct model *model) {
  for (int peer = 0; peer < RANKS; peer++) {
    if (model->calls[SEND][peer] || model->calls[RECV][peer]) return false;
  }
  return true;
}

static ncclComm_t model_key(const struct model *model) {
  return (ncclComm_t)(calls ? model->comm : contextOf(model->comm));
}

static bool model_check(const struct model *model, char *error, size_t size) {
  ultraepTraffic_t traffic = ULTRAEP_TRAFFIC_INITIALIZER;
  row_t bytes[2], counts[2];

  if (!model->comm || model_is_empty(model)) return true;
  traffic.sendBytes = bytes[SEND];
  traffic.recvBytes = bytes[RECV];
  traffic.sendCalls = counts[SEND];
  traffic.recvCalls = counts[RECV];
  traffic.capacity = RANKS;
  if (!calls && !events) {
    if (trafficGet((ncclComm_t)model->comm, &traffic) != ultraepSuccess &&
        trafficGet((ncclComm_t)contextOf(model->comm), &traffic) != ultraepSuccess)
      return true;
    snprintf(error, size, "something is recorded");
    return false;
  }
  if (trafficGet(model_key(model), &traffic) != ultraepSuccess) {
    snprintf(error, size, "a communicator of %d ranks has no record", model->nRanks);
    return false;
  }
  if (traffic.nRanks > model->nRanks || traffic.rank != model->rank) {
    snprintf(error, size, "rank %d of %d is recorded as %d of %d", model->rank, model->nRanks, traffic.rank,
             traffic.nRanks);
    return false;
  }
  for (int peer = traffic.nRanks; peer < RANKS; peer++) bytes[SEND][peer] = bytes[RECV][peer] = 0;
  for (int peer = traffic.nRanks; peer < RANKS; peer++) counts[SEND][peer] = counts[RECV][peer] = 0;
  for (int direction = 0; direction < 2; direction++) {
    if (model_is(bytes[direction], model->bytes[direction], model->nRanks) &&
        model_is(counts[direction], model->calls[direction], model->nRanks))
      continue;
    snprintf(error, size, "direction %d of rank %d of %d: to 0 %lld bytes in %lld calls, not %lld in %lld",
             direction, model->rank, model->nRanks, (long long)bytes[direction][0],
             (long long)counts[direction][0], (long long)model->bytes[direction][0],
             (long long)model->calls[direction][0]);
    return false;
  }
  return true;
}

/* ---- random actions ---- */
static uint32_t next(struct worker *worker, uint32_t below) {
  worker->random = worker->random * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)((worker->random >> 33) % below);
}

static struct model *any_model(struct worker *worker) {
  struct model *model = &worker->models[next(worker, COMMS)];

  return model->comm ? model : NULL;
}

static void act_init(struct worker *worker, struct model *model) {
  fake_id id = {{0}};

  *model = (struct model){.nRanks = 1 + (int)next(worker, RANKS)};
  model->rank = (int)next(worker, (uint32_t)model->nRanks);
  id.bytes[0] = (char)next(worker, 4);
  if (hooked->init(&model->comm, model->nRanks, id, model->rank) != 0)
    snprintf(worker->error, sizeof(worker->error), "init failed");
}

/* Children have one rank in this NCCL, unless told otherwise. */
static void act_split(struct worker *worker, int number) {
  struct model *parent = any_model(worker);

  if (!parent || worker->children[number]) return;
  if (hooked->split(parent->comm, (int)next(worker, 3), 0, &worker->children[number], NULL) != 0)
    snprintf(worker->error, sizeof(worker->error), "split failed");
  if (worker->depth > 0) worker->children[number] = worker; /* comes later; not null meanwhile */
}

static void children_take(struct worker *worker) {
  for (int i = 0; i < COMMS; i++) {
    if (!worker->children[i]) continue;
    worker->models[i] = (struct model){.comm = worker->children[i], .nRanks = 1};
    worker->children[i] = NULL;
  }
}

static void act_make(struct worker *worker) {
  const int number = (int)next(worker, COMMS);

  if (worker->models[number].comm || worker->children[number]) return;
  if (worker->depth == 0 && next(worker, 3) == 0) {
    act_split(worker, number);
    children_take(worker);
  } else {
    act_init(worker, &worker->models[number]);
  }
}

/* The record ends with the communicator, whoever ends it. */
static void act_end(struct worker *worker) {
  struct model *model = any_model(worker);
  ultraepTraffic_t traffic = ULTRAEP_TRAFFIC_INITIALIZER;
  const bool sees = calls || events;
  const struct client *from = sees && next(worker, 4) == 0 && getenv("ROLES_TOLD") ? &direct : hooked;
  ncclComm_t key;

  if (!model || worker->depth > 0) return;
  if (!model_check(model, worker->error, sizeof(worker->error))) return;
  key = model_key(model);
  if (next(worker, 3) == 0) (void)from->finalize(model->comm);
  (void)(next(worker, 2) ? from->abort : from->destroy)(model->comm);
  if (trafficGet(key, &traffic) == ultraepSuccess && worker->isAlone)
    snprintf(worker->error, sizeof(worker->error), "a record outlives its communicator");
  model->comm = NULL;
}

/* The call of an operation, by a way that is taken over or, where events see it, by one that is not. */
static void act_operation(struct worker *worker) {
  static const int typeBytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
  const struct client *from = calls && events && next(worker, 3) == 0 ? &direct : hooked;
  struct model *model = any_model(worker);
  const int kind = (int)next(worker, 7), type = (int)next(worker, 12);
  const size_t count = next(worker, 1000);
  const int64_t bytes = (int64_t)count * typeBytes[type];
  int peer, error = 0;

  if (!model) return;
  peer = (int)next(worker, (uint32_t)model->nRanks);
  if (worker->isAlone && next(worker, 20) == 0) error = nccl->result = 3;
  if (kind <= 1) {
    if (from->send(NULL, count, type, peer, model->comm, NULL) == 0) model_add(model, SEND, peer, bytes);
  } else if (kind == 2) {
    if (from->recv(NULL, count, type, peer, model->comm, NULL) == 0) model_add(model, RECV, peer, bytes);
  } else if (kind == 3) {
    if (from->allToAll(NULL, NULL, count, type, model->comm, NULL) == 0) {
      for (int r = 0; r < model->nRanks; r++) {
        model_add(model, SEND, r, bytes);
        model_add(model, RECV, r, bytes);
      }
    }
  } else if (kind <= 5) {
    const int toRoot = kind == 4 ? SEND : RECV;

    if ((kind == 4 ? from->gather : from->scatter)(NULL, NULL, count, type, peer, model->comm, NULL) == 0) {
      model_add(model, toRoot, peer, bytes);
      for (int r = 0; r < model->nRanks && model->rank == peer; r++) model_add(model, !toRoot, r, bytes);
    }
  } else {
    (void)from->allReduce(NULL, NULL, count, type, 0, model->comm, NULL);
  }
  if (error) nccl->result = 0;
}

static void act_group(struct worker *worker) {
  if (worker->depth < DEPTH && next(worker, 2)) {
    worker->depth++;
    (void)hooked->groupStart();
  } else if (worker->depth > 0) {
    (void)hooked->groupEnd();
    worker->depth--;
  }
}

static void act_check(struct worker *worker) {
  for (int i = 0; i < COMMS && worker->depth == 0 && !worker->error[0]; i++)
    (void)model_check(&worker->models[i], worker->error, sizeof(worker->error));
}

static void *worker_run(void *argument) {
  struct worker *worker = argument;

  for (int i = 0; i < ACTIONS && !worker->error[0]; i++) {
    const uint32_t choice = next(worker, 100);

    if (choice < 4) act_make(worker);
    if (choice >= 4 && choice < 6) act_end(worker);
    if (choice >= 6 && choice < 20) act_group(worker);
    if (choice == 20) act_check(worker);
    if (choice > 20) act_operation(worker);
  }
  while (worker->depth > 0) act_group(worker);
  for (int i = 0; i < COMMS; i++) {
    if (!worker->error[0]) (void)model_check(&worker->models[i], worker->error, sizeof(worker->error));
    if (worker->models[i].comm) (void)hooked->destroy(worker->models[i].comm);
  }
  return NULL;
}

/* ---- tests ---- */
static void *direct_symbol(void *library, const char *name) {
  void *symbol = dlsym(library, name);

  assert_non_null(symbol);
  return symbol;
}

/* A communicator that stays, so that the plugins do, and through which the first call goes. */
static void *lasting;

static int roles_setup(void **state) {
  const char *counts = getenv("ROLES_COUNT"), *plugin = getenv("NCCL_TUNER_PLUGIN");
  void *library, *fake;

  (void)state;
  nccl_open();
  hooked = client_open("now");
  fake = library_open("libtakeover_nccl.so", RTLD_NOW | RTLD_NOLOAD);
  direct.send = (__typeof__(ncclSend) *)direct_symbol(fake, "pncclSend");
  direct.recv = (__typeof__(ncclRecv) *)direct_symbol(fake, "pncclRecv");
  direct.allToAll = (__typeof__(ncclAlltoAll) *)direct_symbol(fake, "pncclAlltoAll");
  direct.gather = (__typeof__(ncclGather) *)direct_symbol(fake, "pncclGather");
  direct.scatter = (__typeof__(ncclScatter) *)direct_symbol(fake, "pncclScatter");
  direct.allReduce = (__typeof__(ncclAllReduce) *)direct_symbol(fake, "pncclAllReduce");
  direct.destroy = (__typeof__(ncclCommDestroy) *)direct_symbol(fake, "pncclCommDestroy");
  direct.abort = (__typeof__(ncclCommAbort) *)direct_symbol(fake, "pncclCommAbort");
  direct.finalize = (__typeof__(ncclCommFinalize) *)direct_symbol(fake, "pncclCommFinalize");
  hashOf = (uint64_t(*)(const void *))direct_symbol(fake, "fake_nccl_hash");
  contextOf = (void *(*)(const void *))direct_symbol(fake, "fake_nccl_context");
  if (!counts) counts = "";
  calls = strcmp(counts, "calls") == 0 || strcmp(counts, "both") == 0;
  events = strcmp(counts, "events") == 0 || strcmp(counts, "both") == 0;
  assert_int_equal(hooked->init(&lasting, 4, commId, 1), 0);
  if (!plugin) plugin = getenv("NCCL_PROFILER_PLUGIN");
  library = dlopen(plugin, RTLD_NOW | RTLD_NOLOAD);
  if (!library) fail_msg("the fake NCCL did not load %s", plugin);
  trafficGet =
      (ultraepResult_t(*)(ncclComm_t, ultraepTraffic_t *))direct_symbol(library, "ultraepTrafficGet");
  assert_int_equal(hooked->send(NULL, 10, FLOAT32, 3, lasting, NULL), 0);
  return 0;
}

/* Of the communicator that was made before anything was taken over, and of others. */
static void test_ids(void **state) {
  struct model first = {.comm = lasting, .rank = 1, .nRanks = 4};
  ultraepTraffic_t traffic = ULTRAEP_TRAFFIC_INITIALIZER;
  const bool isTold = getenv("ROLES_TOLD") != NULL;
  uint64_t hashes[2];

  (void)state;
  if (!calls && !events) return;
  model_add(&first, SEND, 3, 40);
  assert_int_equal(trafficGet(model_key(&first), &traffic), ultraepSuccess);
  assert_int_equal(traffic.totalSendBytes, 40);
  assert_int_equal(traffic.totalSendCalls, 1);
  assert_true(traffic.hash == (isTold || !calls ? hashOf(lasting) : 0));
  for (int rank = 0; rank < 2; rank++) {
    struct model model = {.rank = rank, .nRanks = 4};

    assert_int_equal(hooked->init(&model.comm, 4, commId, rank), 0);
    assert_int_equal(hooked->send(NULL, 1, FLOAT32, 3, model.comm, NULL), 0);
    assert_int_equal(trafficGet(model_key(&model), &traffic), ultraepSuccess);
    hashes[rank] = traffic.hash;
    if (isTold) assert_true(traffic.hash == hashOf(model.comm));
    assert_int_equal(hooked->destroy(model.comm), 0);
  }
  assert_true(hashes[0] != 0 && hashes[0] == hashes[1]);
}

static void test_fuzz_alone(void **state) {
  (void)state;
  for (uint64_t seed = 1; seed <= 5; seed++) {
    struct worker worker = {.random = seed, .isAlone = true};

    worker_run(&worker);
    if (worker.error[0]) fail_msg("seed %llu: %s", (unsigned long long)seed, worker.error);
  }
}

static void test_fuzz_threads(void **state) {
  static struct worker workers[THREADS];

  (void)state;
  for (int i = 0; i < THREADS; i++) {
    workers[i] = (struct worker){.random = 1000 + (uint64_t)i};
    assert_int_equal(pthread_create(&workers[i].thread, NULL, worker_run, &workers[i]), 0);
  }
  for (int i = 0; i < THREADS; i++) assert_int_equal(pthread_join(workers[i].thread, NULL), 0);
  for (int i = 0; i < THREADS; i++) {
    if (workers[i].error[0]) fail_msg("thread %d: %s", i, workers[i].error);
  }
}

static void test_many(void **state) {
  size_t before = 0;

  (void)state;
  for (int i = 0; i < MANY; i++) {
    fake_id id = {{(char)i, (char)(i >> 8)}};
    void *comm, *child;

    assert_int_equal(hooked->init(&comm, 64, id, i % 64), 0);
    assert_int_equal(hooked->send(NULL, 1, FLOAT32, 5, comm, NULL), 0);
    if (i % 4 == 0) {
      assert_int_equal(hooked->split(comm, 1, 0, &child, NULL), 0);
      assert_int_equal(hooked->send(NULL, 1, FLOAT32, 0, child, NULL), 0);
      assert_int_equal(hooked->abort(child), 0);
    }
    assert_int_equal(i % 3 == 0 ? hooked->abort(comm) : hooked->destroy(comm), 0);
    if (i == MANY / 10) before = mallinfo2().uordblks;
  }
  /* One byte a communicator would be 180 kB. */
  assert_in_range(mallinfo2().uordblks, 0, before + 8192);
}

static int roles_teardown(void **state) {
  (void)state;
  assert_int_equal(hooked->destroy(lasting), 0);
  assert_int_equal(nccl->comms, 0);
  return 0;
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_ids),
      cmocka_unit_test(test_fuzz_alone),
      cmocka_unit_test(test_fuzz_threads),
      cmocka_unit_test(test_many),
  };

  return cmocka_run_group_tests(tests, roles_setup, roles_teardown);
}
