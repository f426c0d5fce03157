/* The fake NCCL's plugins: one library for each role, loaded by the first communicator and closed by the
 * last.
 */
#include "fake_nccl_comm.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

typedef int (*fake_init_fn)(void **context, uint64_t id, size_t nRanks, size_t nNodes, void *logger,
                            void *domains, void *constants);
typedef int (*fake_finalize_fn)(void *context);
struct fake_tuner {
  const char *name;
  fake_init_fn init;
  void *getCollInfo;
  fake_finalize_fn finalize;
};

static pthread_mutex_t fakePluginLock = PTHREAD_MUTEX_INITIALIZER;
static void *fakeTunerLibrary, *fakeProfilerLibrary;
static struct fake_tuner *fakeTuner;
static struct nccl_profiler fakeProfiler;
static int fakePlugged;

static void *fake_library_open(const char *variable) {
  const char *name = getenv(variable);

  return name ? dlopen(name, RTLD_NOW | RTLD_LOCAL) : NULL;
}

static int fake_version(const char *variable, int newest) {
  const char *text = getenv(variable);

  return text ? atoi(text) : newest;
}

static void fake_libraries_open(void) {
  char table[32];
  const int profiler = fake_version("FAKE_NCCL_PROFILER", NCCL_NEWEST_PROFILER);

  fakeTunerLibrary = fake_library_open("NCCL_TUNER_PLUGIN");
  fakeProfilerLibrary = fake_library_open("NCCL_PROFILER_PLUGIN");
  snprintf(table, sizeof(table), "ncclTunerPlugin_v%d", fake_version("FAKE_NCCL_TUNER", NCCL_NEWEST_TABLE));
  if (fakeTunerLibrary) fakeTuner = dlsym(fakeTunerLibrary, table);
  if (fakeProfilerLibrary && !nccl_profiler_find(fakeProfilerLibrary, profiler, profiler, &fakeProfiler)) {
    dlclose(fakeProfilerLibrary);
    fakeProfilerLibrary = NULL;
  }
}

void fake_plugins_open(struct fake_comm *comm) {
  pthread_mutex_lock(&fakePluginLock);
  if (fakePlugged++ == 0) fake_libraries_open();
  pthread_mutex_unlock(&fakePluginLock);
  if (fakeProfilerLibrary) {
    comm->profiled = (struct nccl_profiled){.profiler = &fakeProfiler,
                                            .name = "fake",
                                            .hash = comm->hash,
                                            .nNodes = 1,
                                            .nRanks = comm->nRanks,
                                            .rank = comm->rank};
    (void)nccl_profiled_init(&comm->profiled, fake_nccl_log);
  }
  if (fakeTuner)
    fakeTuner->init(&comm->tunerContext, comm->hash, (size_t)comm->nRanks, 1, (void *)fake_nccl_log, NULL,
                    NULL);
}

void fake_plugins_close(struct fake_comm *comm) {
  if (fakeTuner) fakeTuner->finalize(comm->tunerContext);
  if (comm->profiled.profiler) (void)nccl_profiled_finalize(&comm->profiled);
  pthread_mutex_lock(&fakePluginLock);
  if (--fakePlugged == 0) {
    if (fakeTunerLibrary) dlclose(fakeTunerLibrary);
    if (fakeProfilerLibrary) dlclose(fakeProfilerLibrary);
    fakeTunerLibrary = fakeProfilerLibrary = NULL;
    fakeTuner = NULL;
  }
  pthread_mutex_unlock(&fakePluginLock);
}

/* ---- operations, until their group ends ---- */
enum { FAKE_PENDING = 4096, FAKE_BATCH = 64 };

struct fake_pending {
  struct fake_comm *comm;
  struct nccl_operation operation;
};
static _Thread_local struct fake_pending *fakePending;
static _Thread_local int fakePendingCount, fakeDepth;

static void fake_pending_launch(void) {
  int first = 0;

  while (first < fakePendingCount) {
    struct nccl_operation batch[FAKE_BATCH];
    struct fake_comm *comm = fakePending[first].comm;
    int count = 0;

    while (first + count < fakePendingCount && count < FAKE_BATCH &&
           fakePending[first + count].comm == comm) {
      batch[count] = fakePending[first + count].operation;
      count++;
    }
    (void)nccl_profiled_group(&comm->profiled, batch, count, false, NULL);
    first += count;
  }
  fakePendingCount = 0;
  free(fakePending);
  fakePending = NULL;
}

void fake_operation(struct fake_comm *comm, int kind, size_t count, int type, int peer) {
  if (!comm || !comm->profiled.profiler) return;
  if (!fakePending) fakePending = calloc(FAKE_PENDING, sizeof(*fakePending));
  if (!fakePending || fakePendingCount == FAKE_PENDING) return;
  fakePending[fakePendingCount++] =
      (struct fake_pending){comm, {.kind = kind, .count = count, .type = type, .peer = peer}};
  if (fakeDepth == 0) fake_pending_launch();
}

void fake_group_enter(void) {
  fakeDepth++;
}

int fake_group_leave(void) {
  if (fakeDepth > 0) fakeDepth--;
  if (fakeDepth == 0) fake_pending_launch();
  return fakeDepth;
}

void fake_group_drop(void) {
  fakePendingCount = 0;
}

int fake_group_depth(void) {
  return fakeDepth;
}
