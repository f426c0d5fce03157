#include "fake_nccl.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define FAKE_EXPORT __attribute__((visibility("default")))
#define FAKE_TWIN(name) extern __typeof__(name) p##name __attribute__((visibility("default")))
#define FAKE_WEAK(name)                                                                                      \
  extern __typeof__(name) name __attribute__((weak, alias("p" #name), visibility("default")))

struct fake_comm {
  int rank, nRanks;
  void *context;
};

typedef int (*fake_init_fn)(void **context, uint64_t id, size_t nRanks, size_t nNodes, void *logger,
                            void *domains, void *constants);
typedef int (*fake_finalize_fn)(void *context);
struct fake_tuner {
  const char *name;
  fake_init_fn init;
  void *getCollInfo;
  fake_finalize_fn finalize;
};

static pthread_mutex_t fakeLock = PTHREAD_MUTEX_INITIALIZER;
static struct fake_state fakeState;
static void *fakePlugin;
static struct fake_tuner *fakeTuner;
static int fakeComms;

FAKE_EXPORT struct fake_state *fake_nccl_state(void) {
  return &fakeState;
}

FAKE_EXPORT void fake_nccl_log(int level, unsigned long subsystems, const char *where, int line,
                               const char *format, ...) {
  va_list arguments;

  (void)level, (void)subsystems, (void)where, (void)line;
  pthread_mutex_lock(&fakeLock);
  fakeState.lines++;
  va_start(arguments, format);
  vsnprintf(fakeState.line, sizeof(fakeState.line), format, arguments);
  va_end(arguments);
  pthread_mutex_unlock(&fakeLock);
}

static int fake_record(struct fake_call call, int depth) {
  int result;

  pthread_mutex_lock(&fakeLock);
  fakeState.last = call;
  fakeState.calls++;
  fakeState.depth += depth;
  result = fakeState.result;
  pthread_mutex_unlock(&fakeLock);
  return result;
}

FAKE_TWIN(ncclSend);
int pncclSend(const void *buffer, size_t count, int type, int peer, void *comm, void *stream) {
  return fake_record((struct fake_call){"ncclSend", buffer, NULL, count, type, peer, comm, stream}, 0);
}
FAKE_WEAK(ncclSend);

FAKE_TWIN(ncclRecv);
int pncclRecv(void *buffer, size_t count, int type, int peer, void *comm, void *stream) {
  return fake_record((struct fake_call){"ncclRecv", NULL, buffer, count, type, peer, comm, stream}, 0);
}
FAKE_WEAK(ncclRecv);

FAKE_TWIN(ncclGroupStart);
int pncclGroupStart(void) {
  return fake_record((struct fake_call){.name = "ncclGroupStart"}, 1);
}
FAKE_WEAK(ncclGroupStart);

FAKE_TWIN(ncclGroupEnd);
int pncclGroupEnd(void) {
  return fake_record((struct fake_call){.name = "ncclGroupEnd"}, -1);
}
FAKE_WEAK(ncclGroupEnd);

/* Also calls the public name from within, as a collective of NCCL might: that is not the program's operation.
 */
FAKE_TWIN(ncclAlltoAll);
int pncclAlltoAll(const void *send, void *recv, size_t count, int type, void *comm, void *stream) {
  (void)ncclSend(send, count, type, 0, comm, stream);
  return fake_record((struct fake_call){"ncclAlltoAll", send, recv, count, type, -1, comm, stream}, 0);
}
FAKE_WEAK(ncclAlltoAll);

FAKE_TWIN(ncclCommCount);
int pncclCommCount(const void *comm, int *count) {
  if (!comm) return 4;
  *count = ((const struct fake_comm *)comm)->nRanks;
  return 0;
}
FAKE_WEAK(ncclCommCount);

FAKE_TWIN(ncclCommUserRank);
int pncclCommUserRank(const void *comm, int *rank) {
  if (!comm) return 4;
  *rank = ((const struct fake_comm *)comm)->rank;
  return 0;
}
FAKE_WEAK(ncclCommUserRank);

static void fake_plugin_open(struct fake_comm *comm) {
  const char *name = getenv("NCCL_TUNER_PLUGIN");

  if (!fakePlugin && name) fakePlugin = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (fakePlugin) fakeTuner = dlsym(fakePlugin, "ncclTunerPlugin_v6");
  if (fakeTuner) {
    fakeTuner->init(&comm->context, 1, (size_t)comm->nRanks, 1, (void *)fake_nccl_log, NULL, NULL);
  }
}

FAKE_TWIN(ncclCommInitRank);
int pncclCommInitRank(void **comm, int nRanks, int rank) {
  struct fake_comm *made = calloc(1, sizeof(*made));

  if (!made) return 2;
  made->rank = rank;
  made->nRanks = nRanks;
  fake_plugin_open(made);
  fakeComms++;
  *comm = made;
  return 0;
}
FAKE_WEAK(ncclCommInitRank);

static int fake_comm_end(struct fake_comm *comm, const char *name) {
  int result = fake_record((struct fake_call){.name = name, .comm = comm}, 0);

  if (!comm) return 4;
  if (fakeTuner) fakeTuner->finalize(comm->context);
  if (--fakeComms == 0 && fakePlugin) {
    dlclose(fakePlugin);
    fakePlugin = NULL;
    fakeTuner = NULL;
  }
  free(comm);
  return result;
}

FAKE_TWIN(ncclCommDestroy);
int pncclCommDestroy(void *comm) {
  return fake_comm_end(comm, "ncclCommDestroy");
}
FAKE_WEAK(ncclCommDestroy);

FAKE_TWIN(ncclCommAbort);
int pncclCommAbort(void *comm) {
  return fake_comm_end(comm, "ncclCommAbort");
}
FAKE_WEAK(ncclCommAbort);

FAKE_TWIN(ncclCommFinalize);
int pncclCommFinalize(void *comm) {
  return fake_record((struct fake_call){.name = "ncclCommFinalize", .comm = comm}, 0);
}
FAKE_WEAK(ncclCommFinalize);
