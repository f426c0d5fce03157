/* The emulated runtime: streams and events.
 *
 * A stream is a thread that runs what is enqueued, in order; it starts with the first task. The null stream
 * is the calling thread: its tasks run within the call and wait for no other stream, for all streams of the
 * project are made not to wait for it either. Threads are detached: those of streams that nobody destroys
 * sleep until the process ends. */
#include "runtime.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

struct CUstream_st {
  struct CUstream_st *previous, *next; /* of all */
  int refs;                            /* the handle's, the thread's, those of waits; under streams.lock */
  int device;
  unsigned long long id;
  runtimeCaptured_t captured;
  pthread_mutex_t lock;
  pthread_cond_t hasWork, hasDone;
  runtimeTask_t *first, *last;
  uint64_t nEnqueued, nDone;
  bool isRunning, isEnding;
};

static struct {
  pthread_mutex_t lock;
  struct CUstream_st *first;
  unsigned long long nMade;
} streams = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* ---- tasks ---- */

runtimeTask_t *runtime_task_make(void (*run)(void *), void (*drop)(void *), size_t bytes) {
  void *made = NULL;
  if (posix_memalign(&made, RUNTIME_ARGUMENT_ALIGNMENT, sizeof(runtimeTask_t) + bytes) != 0) abort();
  runtimeTask_t *task = made;
  *task = (runtimeTask_t){.run = run, .drop = drop};
  return task;
}

void runtime_task_free(runtimeTask_t *task) {
  if (task->drop) task->drop(task->argument);
  if (task->event) runtime_event_drop(task->event);
  free(task);
}

cudaError_t emulated_enqueue(cudaStream_t stream, void (*run)(void *argument), const void *argument,
                             size_t bytes) {
  (void)runtime_device();
  runtimeTask_t *task = runtime_task_make(run, NULL, bytes);
  if (bytes > 0) memcpy(task->argument, argument, bytes);
  return runtime_error(runtime_enqueue(stream, task));
}

typedef struct {
  cudaHostFn_t function;
  void *argument;
} hostCall_t;

static void host_call_run(void *argument) {
  const hostCall_t *call = argument;
  call->function(call->argument);
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *argument) {
  if (!function) return runtime_error(cudaErrorInvalidValue);
  (void)runtime_device();
  runtimeTask_t *task = runtime_task_make(host_call_run, NULL, sizeof(hostCall_t));
  *(hostCall_t *)(void *)task->argument = (hostCall_t){function, argument};
  return runtime_error(runtime_enqueue(stream, task));
}

/* ---- streams ---- */

bool runtime_stream_is_null(cudaStream_t stream) {
  return !stream || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
}

int runtime_stream_device(cudaStream_t stream) {
  return runtime_stream_is_null(stream) ? runtime_device() : stream->device;
}

runtimeCaptured_t *runtime_stream_captured(cudaStream_t stream) {
  return &stream->captured;
}

static void stream_drop(cudaStream_t self) {
  (void)pthread_mutex_lock(&streams.lock);
  bool isLast = --self->refs == 0;
  if (isLast) {
    if (self->previous)
      self->previous->next = self->next;
    else
      streams.first = self->next;
    if (self->next) self->next->previous = self->previous;
  }
  (void)pthread_mutex_unlock(&streams.lock);
  if (!isLast) return;
  (void)pthread_cond_destroy(&self->hasDone);
  (void)pthread_cond_destroy(&self->hasWork);
  (void)pthread_mutex_destroy(&self->lock);
  free(self);
}

static runtimeTask_t *stream_take(cudaStream_t self) {
  while (!self->first && !self->isEnding) (void)pthread_cond_wait(&self->hasWork, &self->lock);
  runtimeTask_t *task = self->first;
  if (task) self->first = task->next;
  return task;
}

static void *stream_thread(void *argument) {
  cudaStream_t self = argument;
  runtimeTask_t *task;
  (void)cudaSetDevice(self->device);
  (void)pthread_mutex_lock(&self->lock);
  while ((task = stream_take(self)) != NULL) {
    (void)pthread_mutex_unlock(&self->lock);
    task->run(task->argument);
    runtime_task_free(task);
    (void)pthread_mutex_lock(&self->lock);
    self->nDone++;
    (void)pthread_cond_broadcast(&self->hasDone);
  }
  (void)pthread_mutex_unlock(&self->lock);
  stream_drop(self);
  return NULL;
}

/* Under the stream's lock. */
static void stream_start(cudaStream_t self) {
  pthread_t thread;
  pthread_attr_t attributes;
  if (pthread_attr_init(&attributes) != 0) abort();
  (void)pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  (void)pthread_mutex_lock(&streams.lock);
  self->refs++;
  (void)pthread_mutex_unlock(&streams.lock);
  if (pthread_create(&thread, &attributes, stream_thread, self) != 0) abort();
  (void)pthread_attr_destroy(&attributes);
  self->isRunning = true;
}

static void stream_append(cudaStream_t self, runtimeTask_t *task) {
  task->next = NULL;
  (void)pthread_mutex_lock(&self->lock);
  if (self->first)
    self->last->next = task;
  else
    self->first = task;
  self->last = task;
  self->nEnqueued++;
  if (!self->isRunning) stream_start(self);
  (void)pthread_cond_signal(&self->hasWork);
  (void)pthread_mutex_unlock(&self->lock);
}

cudaError_t runtime_enqueue(cudaStream_t stream, runtimeTask_t *task) {
  if (runtime_stream_is_null(stream)) {
    task->run(task->argument);
    runtime_task_free(task);
    return cudaSuccess;
  }
  if (runtime_is_captured(stream)) return runtime_capture_append(stream, task);
  stream_append(stream, task);
  return cudaSuccess;
}

static bool stream_is_idle(cudaStream_t self) {
  (void)pthread_mutex_lock(&self->lock);
  bool isIdle = self->nDone == self->nEnqueued;
  (void)pthread_mutex_unlock(&self->lock);
  return isIdle;
}

/* For what is enqueued by now. */
static void stream_wait(cudaStream_t self) {
  (void)pthread_mutex_lock(&self->lock);
  uint64_t target = self->nEnqueued;
  while (self->nDone < target) (void)pthread_cond_wait(&self->hasDone, &self->lock);
  (void)pthread_mutex_unlock(&self->lock);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned int flags) {
  if (runtime_devices() == 0) return runtime_error(cudaErrorNoDevice);
  if (flags > cudaStreamNonBlocking) return runtime_error(cudaErrorInvalidValue);
  cudaStream_t made = runtime_allocate(sizeof(*made));
  made->refs = 1;
  made->device = runtime_device();
  (void)pthread_mutex_init(&made->lock, NULL);
  (void)pthread_cond_init(&made->hasWork, NULL);
  (void)pthread_cond_init(&made->hasDone, NULL);
  (void)pthread_mutex_lock(&streams.lock);
  made->id = ++streams.nMade;
  made->next = streams.first;
  if (made->next) made->next->previous = made;
  streams.first = made;
  (void)pthread_mutex_unlock(&streams.lock);
  *stream = made;
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) {
  return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned int flags, int priority) {
  (void)priority;
  return cudaStreamCreateWithFlags(stream, flags);
}

cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long *id) {
  *id = runtime_stream_is_null(stream) ? 0 : stream->id;
  return cudaSuccess;
}

/* What is pending still runs; the thread then frees the stream. */
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (runtime_stream_is_null(stream)) return runtime_error(cudaErrorInvalidResourceHandle);
  runtime_capture_leave(stream);
  (void)pthread_mutex_lock(&stream->lock);
  stream->isEnding = true;
  (void)pthread_cond_signal(&stream->hasWork);
  (void)pthread_mutex_unlock(&stream->lock);
  stream_drop(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (runtime_stream_is_null(stream)) return cudaSuccess;
  if (runtime_is_captured(stream)) return runtime_error(runtime_capture_refuse(stream));
  stream_wait(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  if (runtime_stream_is_null(stream)) return cudaSuccess;
  if (runtime_is_captured(stream)) return runtime_error(runtime_capture_refuse(stream));
  return stream_is_idle(stream) ? cudaSuccess : cudaErrorNotReady;
}

/* All streams there are, held. */
static cudaStream_t *streams_hold(int *n) {
  int count = 0;
  (void)pthread_mutex_lock(&streams.lock);
  for (cudaStream_t s = streams.first; s; s = s->next) count++;
  cudaStream_t *held = runtime_allocate(((size_t)count + 1) * sizeof(cudaStream_t));
  for (cudaStream_t s = streams.first; s; s = s->next) {
    s->refs++;
    held[(*n)++] = s;
  }
  (void)pthread_mutex_unlock(&streams.lock);
  return held;
}

cudaError_t cudaDeviceSynchronize(void) {
  int n = 0, device = runtime_device();
  if (runtime_capture_forbids()) return runtime_error(cudaErrorStreamCaptureUnsupported);
  cudaStream_t *held = streams_hold(&n);
  for (int i = 0; i < n; i++) {
    if (held[i]->device == device) stream_wait(held[i]);
    stream_drop(held[i]);
  }
  free(held);
  return cudaSuccess;
}

/* ---- marks ---- */

struct runtimeMark {
  atomic_int refs;
  pthread_mutex_t lock;
  pthread_cond_t changed;
  bool isReached;
  struct timespec time;
};

runtimeMark_t *runtime_mark_make(void) {
  runtimeMark_t *made = runtime_allocate(sizeof(*made));
  atomic_init(&made->refs, 1);
  (void)pthread_mutex_init(&made->lock, NULL);
  (void)pthread_cond_init(&made->changed, NULL);
  return made;
}

runtimeMark_t *runtime_mark_hold(runtimeMark_t *mark) {
  if (mark) atomic_fetch_add(&mark->refs, 1);
  return mark;
}

void runtime_mark_drop(runtimeMark_t *mark) {
  if (!mark || atomic_fetch_sub(&mark->refs, 1) > 1) return;
  (void)pthread_cond_destroy(&mark->changed);
  (void)pthread_mutex_destroy(&mark->lock);
  free(mark);
}

void runtime_mark_reach(runtimeMark_t *mark) {
  (void)pthread_mutex_lock(&mark->lock);
  mark->isReached = true;
  (void)clock_gettime(CLOCK_MONOTONIC, &mark->time);
  (void)pthread_cond_broadcast(&mark->changed);
  (void)pthread_mutex_unlock(&mark->lock);
}

void runtime_mark_wait(runtimeMark_t *mark) {
  if (!mark) return;
  (void)pthread_mutex_lock(&mark->lock);
  while (!mark->isReached) (void)pthread_cond_wait(&mark->changed, &mark->lock);
  (void)pthread_mutex_unlock(&mark->lock);
}

/* Whether it is reached, and when. What was never recorded has no mark and is over. */
static bool mark_look(runtimeMark_t *mark, struct timespec *time) {
  if (!mark) return true;
  (void)pthread_mutex_lock(&mark->lock);
  bool isReached = mark->isReached;
  *time = mark->time;
  (void)pthread_mutex_unlock(&mark->lock);
  return isReached;
}

static runtimeMark_t **mark_of(void *argument) {
  return argument;
}

static void mark_reach_run(void *argument) {
  runtime_mark_reach(*mark_of(argument));
}

static void mark_wait_run(void *argument) {
  runtime_mark_wait(*mark_of(argument));
}

static void mark_task_drop(void *argument) {
  runtime_mark_drop(*mark_of(argument));
}

static runtimeTask_t *mark_task(void (*run)(void *), runtimeMark_t *mark) {
  runtimeTask_t *task = runtime_task_make(run, mark_task_drop, sizeof(mark));
  *mark_of(task->argument) = runtime_mark_hold(mark);
  return task;
}

/* ---- events ---- */

struct CUevent_st {
  atomic_int refs; /* the handle's, and of graphs' nodes */
  int device;
  unsigned flags;
  pthread_mutex_t lock;
  runtimeRecord_t record; /* the last */
};

void runtime_record_drop(runtimeRecord_t *record) {
  runtime_mark_drop(record->mark);
  runtime_capture_drop(record->capture);
}

runtimeRecord_t runtime_event_look(cudaEvent_t event) {
  (void)pthread_mutex_lock(&event->lock);
  runtimeRecord_t record = event->record;
  (void)runtime_mark_hold(record.mark);
  (void)runtime_capture_hold(record.capture);
  (void)pthread_mutex_unlock(&event->lock);
  return record;
}

void runtime_event_set(cudaEvent_t event, runtimeRecord_t record) {
  (void)pthread_mutex_lock(&event->lock);
  runtimeRecord_t before = event->record;
  event->record = record;
  (void)pthread_mutex_unlock(&event->lock);
  runtime_record_drop(&before);
}

void runtime_event_hold(cudaEvent_t event) {
  atomic_fetch_add(&event->refs, 1);
}

void runtime_event_drop(cudaEvent_t event) {
  if (atomic_fetch_sub(&event->refs, 1) > 1) return;
  runtime_record_drop(&event->record);
  (void)pthread_mutex_destroy(&event->lock);
  free(event);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned int flags) {
  if (runtime_devices() == 0) return runtime_error(cudaErrorNoDevice);
  if (flags & ~(unsigned)(cudaEventBlockingSync | cudaEventDisableTiming))
    return runtime_error(flags & cudaEventInterprocess ? cudaErrorNotSupported : cudaErrorInvalidValue);
  cudaEvent_t made = runtime_allocate(sizeof(*made));
  atomic_init(&made->refs, 1);
  made->device = runtime_device();
  made->flags = flags;
  (void)pthread_mutex_init(&made->lock, NULL);
  *event = made;
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) {
  return cudaEventCreateWithFlags(event, cudaEventDefault);
}

/* Waits that are enqueued hold the mark, so the event may go at any time. */
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  if (!event) return runtime_error(cudaErrorInvalidResourceHandle);
  runtime_event_drop(event);
  return cudaSuccess;
}

/* A node that records the event, or waits for it, each time the graph is launched. */
static cudaError_t event_append(cudaStream_t stream, cudaEvent_t event, bool isRecord) {
  runtimeTask_t *task = runtime_task_make(NULL, NULL, 0);
  runtime_event_hold(event);
  task->event = event;
  task->isRecord = isRecord;
  return runtime_capture_append(stream, task);
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned int flags) {
  if (!event || event->device != runtime_stream_device(stream))
    return runtime_error(cudaErrorInvalidResourceHandle);
  bool isCaptured = runtime_is_captured(stream);
  if (flags > cudaEventRecordExternal || (flags == cudaEventRecordExternal && !isCaptured))
    return runtime_error(cudaErrorInvalidValue);
  if (isCaptured && flags == cudaEventRecordExternal) return runtime_error(event_append(stream, event, true));
  if (isCaptured) return runtime_error(runtime_capture_record(stream, event));
  runtimeMark_t *mark = runtime_mark_make();
  runtimeTask_t *task = mark_task(mark_reach_run, mark);
  runtime_event_set(event, (runtimeRecord_t){.mark = mark});
  return runtime_error(runtime_enqueue(stream, task));
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, cudaEventRecordDefault);
}

static cudaError_t event_wait(cudaStream_t stream, const runtimeRecord_t *record) {
  struct timespec unused;
  if (record->capture || runtime_is_captured(stream)) return runtime_capture_wait(stream, record);
  if (mark_look(record->mark, &unused)) return cudaSuccess;
  return runtime_enqueue(stream, mark_task(mark_wait_run, record->mark));
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int flags) {
  if (!event) return runtime_error(cudaErrorInvalidResourceHandle);
  bool isCaptured = runtime_is_captured(stream);
  if (flags > cudaEventWaitExternal || (flags == cudaEventWaitExternal && !isCaptured))
    return runtime_error(cudaErrorInvalidValue);
  if (flags == cudaEventWaitExternal) return runtime_error(event_append(stream, event, false));
  runtimeRecord_t record = runtime_event_look(event);
  cudaError_t error = event_wait(stream, &record);
  runtime_record_drop(&record);
  return runtime_error(error);
}

/* What was last recorded, for a call that a capture does not permit. */
static cudaError_t event_see(cudaEvent_t event, runtimeRecord_t *record) {
  if (!event) return cudaErrorInvalidResourceHandle;
  if (runtime_capture_forbids()) return cudaErrorStreamCaptureUnsupported;
  *record = runtime_event_look(event);
  if (!record->capture) return cudaSuccess;
  runtime_record_drop(record);
  return cudaErrorCapturedEvent;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  runtimeRecord_t record;
  struct timespec unused;
  cudaError_t error = event_see(event, &record);
  if (error != cudaSuccess) return runtime_error(error);
  bool isOver = mark_look(record.mark, &unused);
  runtime_record_drop(&record);
  return isOver ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  runtimeRecord_t record;
  cudaError_t error = event_see(event, &record);
  if (error != cudaSuccess) return runtime_error(error);
  runtime_mark_wait(record.mark);
  runtime_record_drop(&record);
  return cudaSuccess;
}

static cudaError_t event_time(cudaEvent_t event, struct timespec *time) {
  runtimeRecord_t record;
  cudaError_t error = event_see(event, &record);
  if (error != cudaSuccess) return error;
  if (!record.mark || event->flags & cudaEventDisableTiming)
    error = cudaErrorInvalidResourceHandle;
  else if (!mark_look(record.mark, time))
    error = cudaErrorNotReady;
  runtime_record_drop(&record);
  return error;
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) {
  struct timespec from = {0}, to = {0};
  cudaError_t error = event_time(start, &from);
  if (error == cudaSuccess && end && end->device != start->device) error = cudaErrorInvalidResourceHandle;
  if (error == cudaSuccess) error = event_time(end, &to);
  if (error != cudaSuccess) return runtime_error(error);
  *ms = (float)((double)(to.tv_sec - from.tv_sec) * 1e3 + (double)(to.tv_nsec - from.tv_nsec) * 1e-6);
  return cudaSuccess;
}
