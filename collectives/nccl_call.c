/* NCCL's calls that wait for other ranks. Each is made by a thread of its own: where a rank does not come,
 * the caller gives up after the group's timeout, and the thread stays with NCCL until the communicator ends.
 */
#include "nccl_backend.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define CALL_ARGUMENT_BYTES 64
#define CALL_SLICE_MS 5 /* how often an abort is looked for */

typedef struct call {
  struct call *next; /* of those that are kept */
  pthread_mutex_t lock;
  pthread_cond_t changed;
  bool isDone, isAbandoned; /* the second to be set frees or keeps the call */
  int result, device;
  const ncclSymbols_t *nccl;
  ncclComm_t comm;
  ncclCall_t run;
  _Alignas(16) unsigned char argument[CALL_ARGUMENT_BYTES];
} call_t;

static _Thread_local int callOwn;

void nccl_own_calls(bool begin) {
  callOwn += begin ? 1 : -1;
}

bool nccl_is_own_thread(void) {
  return callOwn > 0;
}

int64_t nccl_now_ms(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

void nccl_fail(ncclRank_t *self, ultraepResult_t code) {
  self->isStuck = true;
  self->failure->phase = KERNEL_PHASE_MEMORY;
  self->failure->rank = -1;
  __atomic_store_n(&self->failure->code, (int32_t)code, __ATOMIC_RELEASE);
}

ultraepResult_t nccl_give_up(ncclRank_t *self, const char *phase) {
  nccl_fail(self, ultraepTimeout);
  return error_set(ultraepTimeout, "%s: a rank did not come within %d ms", phase, self->timeoutMs);
}

static void call_free(call_t *call) {
  (void)pthread_cond_destroy(&call->changed);
  (void)pthread_mutex_destroy(&call->lock);
  free(call);
}

/* Abandoned, and NCCL may still write into its argument: never freed. */
static void call_keep(call_t *call) {
  static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  static call_t *kept;
  (void)pthread_mutex_lock(&lock);
  call->next = kept;
  kept = call;
  (void)pthread_mutex_unlock(&lock);
}

static bool call_is_abandoned(call_t *call) {
  (void)pthread_mutex_lock(&call->lock);
  bool isAbandoned = call->isAbandoned;
  (void)pthread_mutex_unlock(&call->lock);
  return isAbandoned;
}

static void *call_thread(void *argument) {
  call_t *call = argument;
  /* What NCCL allocates must not end the capture of another thread. */
  enum cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  (void)cudaThreadExchangeStreamCaptureMode(&mode);
  nccl_own_calls(true);
  (void)cudaSetDevice(call->device);
  int result = call->run(call->nccl, call->comm, call->argument);
  /* A communicator that does not block may have said success before it is done. */
  bool isOver = !call->nccl->CommGetAsyncError || (result != 0 && result != NCCL_IN_PROGRESS);
  while (!isOver && !call_is_abandoned(call)) {
    int status = call->nccl->CommGetAsyncError(call->comm, &result);
    if (status != 0) result = status;
    isOver = result != NCCL_IN_PROGRESS;
    if (!isOver) nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
  }
  (void)pthread_mutex_lock(&call->lock);
  call->result = result;
  call->isDone = true;
  bool isAbandoned = call->isAbandoned;
  (void)pthread_cond_signal(&call->changed);
  (void)pthread_mutex_unlock(&call->lock);
  if (isAbandoned) (isOver ? call_free : call_keep)(call);
  return NULL;
}

static call_t *call_make(const ncclRank_t *self, ncclCall_t run, const void *argument, size_t bytes) {
  call_t *call = calloc(1, sizeof(*call));
  pthread_condattr_t clock;
  if (!call || bytes > sizeof(call->argument) || pthread_condattr_init(&clock) != 0) goto free_call;
  (void)pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
  int status = pthread_cond_init(&call->changed, &clock);
  (void)pthread_condattr_destroy(&clock);
  if (status != 0) goto free_call;
  if (pthread_mutex_init(&call->lock, NULL) != 0) goto destroy_changed;
  call->device = self->device;
  call->nccl = self->nccl;
  call->comm = self->comm;
  call->run = run;
  memcpy(call->argument, argument, bytes);
  return call;

destroy_changed:
  (void)pthread_cond_destroy(&call->changed);
free_call:
  free(call);
  return NULL;
}

static bool call_start(call_t *call) {
  pthread_t thread;
  if (pthread_create(&thread, NULL, call_thread, call) != 0) return false;
  (void)pthread_detach(thread);
  return true;
}

/* True when the call is done; else it is abandoned. */
static bool call_wait(call_t *call, const ncclRank_t *self) {
  int64_t deadline = nccl_now_ms() + self->timeoutMs;
  const volatile int32_t *abort = &self->failure->abort;
  (void)pthread_mutex_lock(&call->lock);
  while (!call->isDone && !*abort && nccl_now_ms() < deadline) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += CALL_SLICE_MS * 1000000;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    (void)pthread_cond_timedwait(&call->changed, &call->lock, &until);
  }
  bool isDone = call->isDone;
  call->isAbandoned = !isDone;
  (void)pthread_mutex_unlock(&call->lock);
  return isDone;
}

ultraepResult_t nccl_call(ncclRank_t *self, ncclCall_t run, void *argument, size_t bytes, const char *what) {
  call_t *call = call_make(self, run, argument, bytes);
  if (!call) return error_set(ultraepSystemError, "%s: no memory for a call of NCCL", what);
  if (!call_start(call)) {
    call_free(call);
    return error_set(ultraepSystemError, "%s: no thread for a call of NCCL", what);
  }
  if (!call_wait(call, self)) return nccl_give_up(self, what);
  int result = call->result;
  memcpy(argument, call->argument, bytes);
  call_free(call);
  return result == 0 ? ultraepSuccess : nccl_nccl_error(self, result, what);
}
