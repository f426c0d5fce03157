/* Communicators: how they begin and end, host calls that ranks make together. */
#include "nccl_emulated.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define NCCL_VERSION 23007
#define NO_COLOUR (-1)
#define CONFIG_MAGIC 0xcafebeefU

pthread_mutex_t ncclLock = PTHREAD_MUTEX_INITIALIZER;
ncclComm_t ncclListed;

static ncclWorld_t *openWorlds; /* whose ranks have not all come */
static uint64_t lastSerial;     /* of ids and communicators */
static _Thread_local const char *lastError = "";

/* The beginning of ncclConfig_t. */
typedef struct {
  size_t size;
  unsigned magic, version;
  int blocking;
} ncclConfig_t;

typedef struct {
  char bytes[128];
} ncclUniqueId_t;

typedef struct {
  uint64_t number;
  int64_t process;
} idContent_t;

void *nccl_need(size_t n, size_t bytes) {
  void *made = calloc(n > 0 ? n : 1, bytes);
  if (!made) abort();
  return made;
}

int nccl_fail(int result, const char *text) {
  lastError = text;
  return result;
}

int nccl_worse(int one, int other) {
  return one == NCCL_SUCCESS || (one == NCCL_IN_PROGRESS && other != NCCL_SUCCESS) ? other : one;
}

void nccl_lock(void) {
  (void)pthread_mutex_lock(&ncclLock);
}

void nccl_unlock(void) {
  (void)pthread_mutex_unlock(&ncclLock);
}

/* ---- worlds; with the lock ---- */

static void world_close(ncclWorld_t *world) {
  for (ncclWorld_t **link = &openWorlds; *link; link = &(*link)->next)
    if (*link == world) {
      *link = world->next;
      return;
    }
}

static ncclWorld_t *world_make(uint64_t id, int nRanks) {
  ncclWorld_t *world = nccl_need(1, sizeof(*world) + (size_t)nRanks * sizeof(bool));
  world->id = id;
  world->nRanks = nRanks;
  return world;
}

static ncclWorld_t *world_find(uint64_t id, int nRanks) {
  for (ncclWorld_t *world = openWorlds; world; world = world->next)
    if (world->id == id) return world;
  ncclWorld_t *world = world_make(id, nRanks);
  world->next = openWorlds;
  openWorlds = world;
  return world;
}

static void world_enter(ncclWorld_t *world, ncclComm_t comm, int rank) {
  world->taken[rank] = true;
  world->nUsers++;
  if (++world->nTaken == world->nRanks) world_close(world);
  comm->world = world;
  comm->rank = rank;
  comm->nSent = nccl_need((size_t)world->nRanks, sizeof(uint64_t));
  comm->nReceived = nccl_need((size_t)world->nRanks, sizeof(uint64_t));
}

static void world_leave(ncclWorld_t *world) {
  if (--world->nUsers > 0) return;
  world_close(world);
  free(world);
}

/* ---- communicators; with the lock ---- */

static ncclComm_t comm_make(int device, bool isBlocking) {
  ncclComm_t comm = nccl_need(1, sizeof(*comm));
  (void)pthread_mutex_init(&comm->order, NULL);
  (void)pthread_cond_init(&comm->changed, NULL);
  comm->serial = ++lastSerial;
  comm->device = device;
  comm->isBlocking = isBlocking;
  comm->isListed = true;
  comm->nHolders = 1;
  comm->next = ncclListed;
  ncclListed = comm;
  return comm;
}

/* Not inlined: gcc cannot know that the holders are counted, and takes a second drop for a use after free. */
__attribute__((noinline)) void nccl_comm_drop(ncclComm_t comm) {
  if (!comm || --comm->nHolders > 0) return;
  nccl_windows_free(comm);
  if (comm->world) world_leave(comm->world);
  (void)pthread_cond_destroy(&comm->changed);
  (void)pthread_mutex_destroy(&comm->order);
  free(comm->nSent);
  free(comm->nReceived);
  free(comm);
}

void nccl_comm_release(ncclComm_t comm) {
  nccl_lock();
  nccl_comm_drop(comm);
  nccl_unlock();
}

/* From here on no call finds it. */
static void comm_unlist(ncclComm_t comm) {
  if (!comm->isListed) return;
  ncclComm_t *link = &ncclListed;
  while (*link != comm) link = &(*link)->next;
  *link = comm->next;
  comm->isListed = false;
  nccl_comm_drop(comm);
}

bool nccl_comm_hold(ncclComm_t comm) {
  for (ncclComm_t each = ncclListed; each; each = each->next)
    if (each == comm) return ++comm->nHolders > 0;
  return false;
}

ncclComm_t nccl_comm_find(uint64_t serial) {
  for (ncclComm_t each = ncclListed; each; each = each->next)
    if (each->serial == serial) {
      each->nHolders++;
      return each;
    }
  return NULL;
}

int nccl_comm_use(ncclComm_t comm) {
  int result = NCCL_SUCCESS;
  nccl_lock();
  if (!nccl_comm_hold(comm)) {
    result = nccl_fail(NCCL_INVALID_ARGUMENT, "there is no such communicator");
  } else {
    if (comm->result == NCCL_IN_PROGRESS)
      result = nccl_fail(NCCL_INVALID_ARGUMENT, "the communicator's last call is in progress");
    else if (comm->result != NCCL_SUCCESS)
      result = nccl_fail(comm->result, "the communicator has failed");
    else if (comm->isFinalized)
      result = nccl_fail(NCCL_INVALID_ARGUMENT, "the communicator was finalized");
    if (result != NCCL_SUCCESS) nccl_comm_drop(comm);
  }
  nccl_unlock();
  return result;
}

/* Waits until all tasks that were issued have ended. */
static int comm_drain(ncclComm_t comm) {
  while (!comm->isAborted && (comm->finished != comm->issued || comm->nRunning > 0))
    (void)pthread_cond_wait(&comm->changed, &ncclLock);
  return comm->isAborted ? NCCL_INTERNAL_ERROR : NCCL_SUCCESS;
}

/* ---- what ranks have called together; with the lock ---- */

/* Each colour is a world; its ranks are in the order of their keys, then of their ranks before. */
static void host_split(const ncclPlace_t *places, int n) {
  for (int r = 0; r < n; r++) {
    const ncclJob_t *first = places[r].op->job;
    if (!first->child || first->child->world) continue;
    ncclWorld_t *world = NULL;
    int nRanks = 0;
    for (int i = 0; i < n; i++) nRanks += places[i].op->job->colour == first->colour;
    world = world_make(0, nRanks);
    for (int i = 0; i < n; i++) {
      const ncclJob_t *job = places[i].op->job;
      int rank = 0;
      if (!job->child || job->colour != first->colour) continue;
      for (int j = 0; j < n; j++) {
        const ncclJob_t *other = places[j].op->job;
        if (other->colour != job->colour) continue;
        rank += other->key < job->key || (other->key == job->key && j < i);
      }
      world_enter(world, job->child, rank);
    }
  }
}

int nccl_host_perform(const ncclPlace_t *places, int n) {
  for (int r = 1; r < n; r++)
    if (places[r].op->kind != places[0].op->kind) return NCCL_INVALID_USAGE;
  if (places[0].op->kind == NCCL_SPLIT) host_split(places, n);
  if (places[0].op->kind == NCCL_REGISTER) nccl_windows_make(places, n);
  return NCCL_SUCCESS;
}

/* ---- jobs: host calls that wait ---- */

/* Takes what the caller holds of the communicators. */
static ncclJob_t *job_make(ncclJob_t content) {
  ncclJob_t *job = nccl_need(1, sizeof(*job));
  *job = content;
  return job;
}

/* The communicator that the call was to make ends. */
static void job_unmake(ncclJob_t *job) {
  if (!job->out) return;
  *job->out = NULL;
  if (job->kind == NCCL_INIT) comm_unlist(job->comm);
  if (job->child) comm_unlist(job->child);
}

static void job_begin_comm(ncclComm_t comm, bool isBlocking) {
  comm->nJobs++;
  if (!isBlocking) comm->result = NCCL_IN_PROGRESS;
}

static void job_begin(ncclJob_t *job) {
  nccl_lock();
  job_begin_comm(job->comm, job->comm->isBlocking);
  if (job->child) {
    job_begin_comm(job->child, job->comm->isBlocking);
    job->child->via = job->comm;
  }
  nccl_unlock();
}

static void job_end_comm(ncclComm_t comm, int result) {
  if (comm->result == NCCL_IN_PROGRESS) comm->result = result;
  comm->nJobs--;
  (void)pthread_cond_broadcast(&comm->changed);
}

/* The program's variable is written before the call counts as done, and not after an abort: the program may
 * have taken it away. */
static void job_publish(ncclJob_t *job) {
  if (!job->made) return;
  if (job->comm->isAborted) {
    nccl_window_free(job->made);
    return;
  }
  nccl_window_add(job->comm, job->made);
  *job->window = job->made;
}

static void job_end(ncclJob_t *job) {
  job_publish(job);
  if (job->result != NCCL_SUCCESS && job->comm->isBlocking) job_unmake(job);
  if (job->child) {
    job->child->via = NULL;
    job_end_comm(job->child, job->result);
  }
  job_end_comm(job->comm, job->result);
  nccl_comm_drop(job->child);
  nccl_comm_drop(job->comm);
}

static void *job_run(void *argument) {
  ncclJob_t *job = argument;
  nccl_lock();
  job->result = job->kind == NCCL_FINALIZE
                    ? comm_drain(job->comm)
                    : nccl_ops_run(job->comm, &(ncclOp_t){.kind = job->kind, .job = job}, 1);
  job_end(job);
  nccl_unlock();
  return NULL;
}

static void *job_run_alone(void *argument) {
  (void)job_run(argument);
  free(argument);
  return NULL;
}

/* NCCL says that the registration of a window has succeeded while it is still under way. */
static int job_detach(ncclJob_t *job) {
  int said = job->kind == NCCL_REGISTER ? NCCL_SUCCESS : NCCL_IN_PROGRESS;
  pthread_t thread;
  if (pthread_create(&thread, NULL, job_run_alone, job) != 0) abort();
  (void)pthread_detach(thread);
  return said;
}

/* Ranks of one communicator may be in one thread's group: they need a thread each. */
static int jobs_wait(ncclJob_t *jobs) {
  int result = NCCL_SUCCESS;
  if (jobs && !jobs->next) (void)job_run(jobs);
  for (ncclJob_t *job = jobs; job && jobs->next; job = job->next)
    if (pthread_create(&job->thread, NULL, job_run, job) != 0) abort();
  for (ncclJob_t *job = jobs; job && jobs->next; job = job->next) (void)pthread_join(job->thread, NULL);
  for (ncclJob_t *job = jobs, *next; job; job = next) {
    next = job->next;
    result = nccl_worse(result, job->result);
    free(job);
  }
  return result;
}

int nccl_jobs_run(ncclJob_t *jobs) {
  ncclJob_t *waited = NULL;
  int result = NCCL_SUCCESS;
  for (ncclJob_t *job = jobs, *next; job; job = next) {
    next = job->next;
    bool isWaited = job->comm->isBlocking;
    job_begin(job);
    if (isWaited) {
      job->next = waited;
      waited = job;
    } else {
      result = nccl_worse(result, job_detach(job));
    }
  }
  return nccl_worse(jobs_wait(waited), result);
}

void nccl_jobs_cancel(ncclJob_t *jobs) {
  for (ncclJob_t *job = jobs, *next; job; job = next) {
    next = job->next;
    nccl_lock();
    job_unmake(job);
    nccl_comm_drop(job->child);
    nccl_comm_drop(job->comm);
    nccl_unlock();
    free(job);
  }
}

int nccl_job_issue(ncclJob_t content) {
  nccl_group_enter();
  nccl_group_add_job(job_make(content));
  return nccl_group_leave();
}

/* ---- making ---- */

/* What the environment says comes before the program's config. False: the config is none. */
static bool config_read(const ncclConfig_t *config, bool *isBlocking) {
  const char *text = getenv("NCCL_COMM_BLOCKING");
  if (config && config->magic != CONFIG_MAGIC) return false;
  if (config && config->blocking != INT_MIN) {
    if (config->blocking != 0 && config->blocking != 1) return false;
    *isBlocking = config->blocking == 1;
  }
  if (text && (strcmp(text, "0") == 0 || strcmp(text, "1") == 0)) *isBlocking = text[0] == '1';
  return true;
}

/* Null: the rank has come before, or others think of another number of ranks. */
static ncclComm_t comm_enter(uint64_t id, int nRanks, int rank, int device, bool isBlocking) {
  ncclComm_t comm = NULL;
  nccl_lock();
  ncclWorld_t *world = world_find(id, nRanks);
  if (world->nRanks == nRanks && !world->taken[rank]) {
    comm = comm_make(device, isBlocking);
    comm->nHolders++; /* the job */
    world_enter(world, comm, rank);
  }
  nccl_unlock();
  return comm;
}

static int comm_init(ncclComm_t *comm, int nRanks, const ncclUniqueId_t *id, int rank, int device,
                     const ncclConfig_t *config) {
  idContent_t content;
  bool isBlocking = true;
  memcpy(&content, id, sizeof(content));
  if (!comm || nRanks < 1 || rank < 0 || rank >= nRanks)
    return nccl_group_fail(nccl_fail(NCCL_INVALID_ARGUMENT, "there is no such rank"));
  if (!config_read(config, &isBlocking))
    return nccl_group_fail(nccl_fail(NCCL_INVALID_ARGUMENT, "the config is not one"));
  if (content.process != (int64_t)getpid())
    return nccl_group_fail(nccl_fail(NCCL_SYSTEM_ERROR, "the id is of another process"));
  ncclComm_t made = comm_enter(content.number, nRanks, rank, device, isBlocking);
  if (!made)
    return nccl_group_fail(nccl_fail(NCCL_INVALID_USAGE, "a rank comes twice, or ranks' numbers differ"));
  *comm = made;
  return nccl_job_issue((ncclJob_t){.kind = NCCL_INIT, .comm = made, .out = comm});
}

static int comm_init_here(ncclComm_t *comm, int nRanks, const ncclUniqueId_t *id, int rank,
                          const ncclConfig_t *config) {
  int device;
  if (cudaGetDevice(&device) != cudaSuccess)
    return nccl_group_fail(nccl_fail(NCCL_CUDA_ERROR, "there is no device"));
  return comm_init(comm, nRanks, id, rank, device, config);
}

NCCL_EXPORT int ncclGetUniqueId(ncclUniqueId_t *id) {
  if (!id) return nccl_fail(NCCL_INVALID_ARGUMENT, "there is no place for an id");
  nccl_lock();
  idContent_t content = {++lastSerial, (int64_t)getpid()};
  nccl_unlock();
  memset(id, 0, sizeof(*id));
  memcpy(id, &content, sizeof(content));
  return NCCL_SUCCESS;
}
NCCL_TWIN(ncclGetUniqueId);

NCCL_EXPORT int ncclCommInitRank(ncclComm_t *comm, int nRanks, ncclUniqueId_t id, int rank) {
  return comm_init_here(comm, nRanks, &id, rank, NULL);
}
NCCL_TWIN(ncclCommInitRank);

NCCL_EXPORT int ncclCommInitRankConfig(ncclComm_t *comm, int nRanks, ncclUniqueId_t id, int rank,
                                       const ncclConfig_t *config) {
  return comm_init_here(comm, nRanks, &id, rank, config);
}
NCCL_TWIN(ncclCommInitRankConfig);

NCCL_EXPORT int ncclCommInitAll(ncclComm_t *comms, int nDevices, const int *devices) {
  ncclUniqueId_t id;
  if (!comms || nDevices < 1) return nccl_fail(NCCL_INVALID_ARGUMENT, "there are no devices");
  (void)ncclGetUniqueId(&id);
  nccl_group_enter();
  for (int i = 0; i < nDevices; i++)
    (void)comm_init(&comms[i], nDevices, &id, i, devices ? devices[i] : i, NULL);
  return nccl_group_leave();
}
NCCL_TWIN(ncclCommInitAll);

NCCL_EXPORT int ncclCommSplit(ncclComm_t parent, int colour, int key, ncclComm_t *comm,
                              const ncclConfig_t *config) {
  ncclComm_t child = NULL;
  int result = nccl_comm_use(parent);
  if (result != NCCL_SUCCESS) return nccl_group_fail(result);
  bool isBlocking = parent->isBlocking;
  bool isValid = comm && colour >= NO_COLOUR && config_read(config, &isBlocking);
  nccl_lock();
  if (isValid && colour != NO_COLOUR) {
    child = comm_make(parent->device, isBlocking);
    child->nHolders++; /* the job */
  }
  if (!isValid) nccl_comm_drop(parent);
  nccl_unlock();
  if (!isValid) return nccl_group_fail(nccl_fail(NCCL_INVALID_ARGUMENT, "the colour or config is not one"));
  *comm = child;
  return nccl_job_issue((ncclJob_t){
      .kind = NCCL_SPLIT, .comm = parent, .child = child, .out = comm, .colour = colour, .key = key});
}
NCCL_TWIN(ncclCommSplit);

/* ---- ending ---- */

/* The last that a rank calls: waits for what it has issued. */
NCCL_EXPORT int ncclCommFinalize(ncclComm_t comm) {
  if (!comm) return NCCL_SUCCESS;
  int result = nccl_comm_use(comm);
  if (result != NCCL_SUCCESS) return nccl_group_fail(result);
  nccl_lock();
  comm->isFinalized = true;
  nccl_unlock();
  return nccl_job_issue((ncclJob_t){.kind = NCCL_FINALIZE, .comm = comm});
}
NCCL_TWIN(ncclCommFinalize);

NCCL_EXPORT int ncclCommDestroy(ncclComm_t comm) {
  int result = NCCL_SUCCESS;
  if (!comm) return NCCL_SUCCESS;
  nccl_lock();
  if (nccl_comm_hold(comm)) {
    comm->isFinalized = true;
    while (!comm->isAborted && comm->nJobs > 0) (void)pthread_cond_wait(&comm->changed, &ncclLock);
    result = comm_drain(comm);
    comm_unlist(comm);
    nccl_comm_drop(comm);
  } else {
    result = nccl_fail(NCCL_INVALID_ARGUMENT, "there is no such communicator");
  }
  nccl_unlock();
  return result;
}
NCCL_TWIN(ncclCommDestroy);

/* When it returns, nothing of this rank waits, and no rank copies from or to its buffers. */
NCCL_EXPORT int ncclCommAbort(ncclComm_t comm) {
  int result = NCCL_SUCCESS;
  if (!comm) return NCCL_SUCCESS;
  nccl_lock();
  if (nccl_comm_hold(comm)) {
    comm->isAborted = true;
    comm_unlist(comm);
    (void)pthread_cond_broadcast(&comm->changed);
    if (comm->via) (void)pthread_cond_broadcast(&comm->via->changed);
    while (comm->nJobs > 0 || comm->nRunning > 0) (void)pthread_cond_wait(&comm->changed, &ncclLock);
    nccl_comm_drop(comm);
  } else {
    result = nccl_fail(NCCL_INVALID_ARGUMENT, "there is no such communicator");
  }
  nccl_unlock();
  return result;
}
NCCL_TWIN(ncclCommAbort);

/* ---- asking ---- */

NCCL_EXPORT int ncclGetVersion(int *version) {
  if (!version) return nccl_fail(NCCL_INVALID_ARGUMENT, "there is no place for a version");
  *version = NCCL_VERSION;
  return NCCL_SUCCESS;
}
NCCL_TWIN(ncclGetVersion);

NCCL_EXPORT const char *ncclGetErrorString(int result) {
  static const char *const texts[] = {"no error",
                                      "unhandled cuda error",
                                      "unhandled system error",
                                      "internal error",
                                      "invalid argument",
                                      "invalid usage",
                                      "remote process exited or there was a network error",
                                      "NCCL operation in progress"};
  return result >= 0 && (size_t)result < sizeof(texts) / sizeof(texts[0]) ? texts[result]
                                                                          : "unknown result code";
}
NCCL_TWIN(ncclGetErrorString);

/* NCCL has one of the process; here it is the thread's. */
NCCL_EXPORT const char *ncclGetLastError(ncclComm_t comm) {
  (void)comm;
  return lastError;
}
NCCL_TWIN(ncclGetLastError);

NCCL_EXPORT int ncclCommGetAsyncError(ncclComm_t comm, int *error) {
  int result = NCCL_INVALID_ARGUMENT;
  nccl_lock();
  if (error && nccl_comm_hold(comm)) {
    *error = comm->result;
    nccl_comm_drop(comm);
    result = NCCL_SUCCESS;
  }
  nccl_unlock();
  return result == NCCL_SUCCESS ? result : nccl_fail(result, "there is no such communicator");
}
NCCL_TWIN(ncclCommGetAsyncError);

typedef enum { ASK_COUNT, ASK_RANK, ASK_DEVICE } ask_t;

static int comm_ask(ncclComm_t comm, ask_t ask, int *value) {
  if (!value) return nccl_fail(NCCL_INVALID_ARGUMENT, "there is no place for an answer");
  int result = nccl_comm_use(comm);
  if (result != NCCL_SUCCESS) return result;
  *value = ask == ASK_COUNT ? comm->world->nRanks : ask == ASK_RANK ? comm->rank : comm->device;
  nccl_comm_release(comm);
  return NCCL_SUCCESS;
}

NCCL_EXPORT int ncclCommCount(ncclComm_t comm, int *count) {
  return comm_ask(comm, ASK_COUNT, count);
}
NCCL_TWIN(ncclCommCount);

NCCL_EXPORT int ncclCommUserRank(ncclComm_t comm, int *rank) {
  return comm_ask(comm, ASK_RANK, rank);
}
NCCL_TWIN(ncclCommUserRank);

NCCL_EXPORT int ncclCommCuDevice(ncclComm_t comm, int *device) {
  return comm_ask(comm, ASK_DEVICE, device);
}
NCCL_TWIN(ncclCommCuDevice);
