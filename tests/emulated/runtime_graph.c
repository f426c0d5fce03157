/* The emulated runtime: captures and graphs.
 *
 * What is enqueued in the streams of a capture is one list, in the order of the calls; a graph is that list,
 * and a launch of it one task that runs it from first to last. That order is a topological one: a call can
 * only depend on earlier calls. So waits among the streams of a capture need no node; they matter for which
 * streams the capture has, and whether all of them are joined to the first when it ends.
 *
 * Events that are external to the graph take part at the launch: what a node waits for, and what others wait
 * for at such an event after the launch, is settled then, as if its work were enqueued one by one. */
#include "runtime.h"

#include <stdlib.h>
#include <string.h>

enum { CAPTURE_MAX_MEMBERS = 64 };

/* What a program ties to graphs' lives. */
struct CUuserObject_st {
  atomic_int refs;
  cudaHostFn_t destroy;
  void *argument;
};

typedef struct graphObject {
  struct graphObject *next;
  cudaUserObject_t object;
  unsigned int count;
} graphObject_t;

struct CUgraph_st {
  atomic_int refs; /* the handle's, those of executable graphs and of launches */
  graphObject_t *objects;
  runtimeTask_t *first;
  int nEvents;
};

struct CUgraphExec_st {
  pthread_mutex_t lock;
  cudaGraph_t graph;
  runtimeMark_t *last; /* the end of the last launch */
};

typedef struct {
  cudaStream_t stream; /* null: destroyed */
  uint64_t version;    /* counts what could be joined */
  bool isLoose;        /* has work, or joined such, that nobody has joined */
} captureMember_t;

struct runtimeCapture {
  atomic_int refs; /* of streams and events */
  runtimeCapture_t *next;
  enum cudaStreamCaptureMode mode;
  pthread_t thread;
  bool isOver, isInvalid;
  cudaGraph_t graph; /* that it becomes; empty until the end */
  runtimeTask_t *first, *last;
  captureMember_t members[CAPTURE_MAX_MEMBERS]; /* the first is where it began */
  int nMembers;
};

/* Of all captures; and how many are under way, for those who need not look. */
static pthread_mutex_t captureLock = PTHREAD_MUTEX_INITIALIZER;
static runtimeCapture_t *captures;
static atomic_int nCaptures;
static _Thread_local enum cudaStreamCaptureMode captureMode = cudaStreamCaptureModeGlobal;

/* ---- graphs' lists ---- */

static void tasks_free(runtimeTask_t *task) {
  while (task) {
    runtimeTask_t *next = task->next;
    runtime_task_free(task);
    task = next;
  }
}

static cudaGraph_t graph_make(void) {
  cudaGraph_t made = runtime_allocate(sizeof(*made));
  atomic_init(&made->refs, 1);
  return made;
}

static void graph_fill(cudaGraph_t graph, runtimeTask_t *first) {
  graph->first = first;
  for (const runtimeTask_t *task = first; task; task = task->next) graph->nEvents += task->event != NULL;
}

static void object_drop(cudaUserObject_t object, unsigned int count) {
  if (atomic_fetch_sub(&object->refs, (int)count) > (int)count) return;
  object->destroy(object->argument);
  free(object);
}

static cudaGraph_t graph_hold(cudaGraph_t graph) {
  atomic_fetch_add(&graph->refs, 1);
  return graph;
}

static void graph_drop(cudaGraph_t graph) {
  if (atomic_fetch_sub(&graph->refs, 1) > 1) return;
  while (graph->objects) {
    graphObject_t *kept = graph->objects;
    graph->objects = kept->next;
    object_drop(kept->object, kept->count);
    free(kept);
  }
  tasks_free(graph->first);
  free(graph);
}

/* ---- captures ---- */

runtimeCapture_t *runtime_capture_hold(runtimeCapture_t *capture) {
  if (capture) atomic_fetch_add(&capture->refs, 1);
  return capture;
}

void runtime_capture_drop(runtimeCapture_t *capture) {
  if (!capture || atomic_fetch_sub(&capture->refs, 1) > 1) return;
  graph_drop(capture->graph);
  tasks_free(capture->first);
  free(capture);
}

static runtimeCapture_t *capture_of(cudaStream_t stream) {
  if (runtime_stream_is_null(stream)) return NULL;
  return atomic_load_explicit(&runtime_stream_captured(stream)->capture, memory_order_acquire);
}

bool runtime_is_captured(cudaStream_t stream) {
  return capture_of(stream) != NULL;
}

/* The following are called under the lock. */

static bool capture_add(runtimeCapture_t *capture, cudaStream_t stream) {
  if (capture->nMembers == CAPTURE_MAX_MEMBERS) return false;
  runtimeCaptured_t *captured = runtime_stream_captured(stream);
  captured->member = capture->nMembers;
  capture->members[capture->nMembers++] = (captureMember_t){.stream = stream};
  atomic_store_explicit(&captured->capture, runtime_capture_hold(capture), memory_order_release);
  return true;
}

static captureMember_t *capture_member(runtimeCapture_t *capture, cudaStream_t stream) {
  return &capture->members[runtime_stream_captured(stream)->member];
}

/* The member's end has changed. Where the capture began nothing need be joined. */
static void member_move(runtimeCapture_t *capture, captureMember_t *member, bool isLoose) {
  member->version++;
  member->isLoose = member != &capture->members[0] && (member->isLoose || isLoose);
}

static bool capture_is_loose(const runtimeCapture_t *capture) {
  for (int i = 1; i < capture->nMembers; i++)
    if (capture->members[i].isLoose) return true;
  return false;
}

static void capture_forget_stream(runtimeCapture_t *capture, int member) {
  cudaStream_t stream = capture->members[member].stream;
  if (!stream) return;
  capture->members[member].stream = NULL;
  atomic_store_explicit(&runtime_stream_captured(stream)->capture, NULL, memory_order_release);
  runtime_capture_drop(capture);
}

/* Lets its streams go, and returns its list. The caller holds a reference. */
static runtimeTask_t *capture_end(runtimeCapture_t *capture) {
  runtimeCapture_t **at = &captures;
  while (*at != capture) at = &(*at)->next;
  *at = capture->next;
  atomic_fetch_sub(&nCaptures, 1);
  capture->isOver = true;
  for (int i = 0; i < capture->nMembers; i++) capture_forget_stream(capture, i);
  runtimeTask_t *tasks = capture->first;
  capture->first = capture->last = NULL;
  return tasks;
}

static bool capture_is_mine(const runtimeCapture_t *capture) {
  return pthread_equal(capture->thread, pthread_self()) != 0;
}

/* A capture forbids by its own mode and by the thread's that asks. */
static bool capture_forbids(const runtimeCapture_t *capture) {
  if (capture->mode == cudaStreamCaptureModeRelaxed) return false;
  if (capture_is_mine(capture)) return true;
  return capture->mode == cudaStreamCaptureModeGlobal && captureMode == cudaStreamCaptureModeGlobal;
}

/* ---- what streams and events ask ---- */

bool runtime_capture_forbids(void) {
  bool forbids = false;
  if (atomic_load(&nCaptures) == 0 || captureMode == cudaStreamCaptureModeRelaxed) return false;
  (void)pthread_mutex_lock(&captureLock);
  for (runtimeCapture_t *capture = captures; capture; capture = capture->next) {
    if (!capture_forbids(capture)) continue;
    capture->isInvalid = true;
    forbids = true;
  }
  (void)pthread_mutex_unlock(&captureLock);
  return forbids;
}

cudaError_t runtime_capture_refuse(cudaStream_t stream) {
  (void)pthread_mutex_lock(&captureLock);
  runtimeCapture_t *capture = capture_of(stream);
  if (capture) capture->isInvalid = true;
  (void)pthread_mutex_unlock(&captureLock);
  return cudaErrorStreamCaptureUnsupported;
}

cudaError_t runtime_capture_append(cudaStream_t stream, runtimeTask_t *task) {
  (void)pthread_mutex_lock(&captureLock);
  runtimeCapture_t *capture = capture_of(stream);
  bool isTaken = capture && !capture->isInvalid;
  if (isTaken) {
    task->next = NULL;
    if (capture->first)
      capture->last->next = task;
    else
      capture->first = task;
    capture->last = task;
    member_move(capture, capture_member(capture, stream), true);
  }
  (void)pthread_mutex_unlock(&captureLock);
  if (!isTaken) runtime_task_free(task);
  return isTaken ? cudaSuccess : cudaErrorStreamCaptureInvalidated;
}

cudaError_t runtime_capture_record(cudaStream_t stream, cudaEvent_t event) {
  runtimeRecord_t record = {0};
  (void)pthread_mutex_lock(&captureLock);
  runtimeCapture_t *capture = capture_of(stream);
  if (capture && !capture->isInvalid) {
    record.capture = runtime_capture_hold(capture);
    record.member = runtime_stream_captured(stream)->member;
    record.version = capture_member(capture, stream)->version;
  }
  (void)pthread_mutex_unlock(&captureLock);
  if (!record.capture) return cudaErrorStreamCaptureInvalidated;
  runtime_event_set(event, record);
  return cudaSuccess;
}

/* Under the lock: the stream, of the same capture, goes on from the recorded place too. */
static void capture_join(runtimeCapture_t *capture, cudaStream_t stream, const runtimeRecord_t *record) {
  captureMember_t *from = &capture->members[record->member], *to = capture_member(capture, stream);
  if (from == to) return;
  bool takesOver = from->isLoose && from->version == record->version;
  if (takesOver) from->isLoose = false;
  member_move(capture, to, takesOver);
}

/* Under the lock. */
static cudaError_t capture_wait(cudaStream_t stream, const runtimeRecord_t *record) {
  runtimeCapture_t *mine = capture_of(stream), *other = record->capture;
  if (!other) {
    if (!record->mark) return cudaSuccess; /* never recorded */
    if (mine) mine->isInvalid = true;
    return cudaErrorStreamCaptureIsolation;
  }
  if (other->isOver) return cudaErrorCapturedEvent;
  if (runtime_stream_is_null(stream)) return cudaErrorStreamCaptureImplicit;
  if (mine && mine != other) {
    mine->isInvalid = other->isInvalid = true;
    return cudaErrorStreamCaptureMerge;
  }
  if (other->isInvalid) return cudaErrorStreamCaptureInvalidated;
  if (!mine && !capture_add(other, stream)) return cudaErrorNotSupported; /* too many for the emulation */
  capture_join(other, stream, record);
  return cudaSuccess;
}

cudaError_t runtime_capture_wait(cudaStream_t stream, const runtimeRecord_t *record) {
  (void)pthread_mutex_lock(&captureLock);
  cudaError_t error = capture_wait(stream, record);
  (void)pthread_mutex_unlock(&captureLock);
  return error;
}

void runtime_capture_leave(cudaStream_t stream) {
  runtimeTask_t *tasks = NULL;
  (void)pthread_mutex_lock(&captureLock);
  runtimeCapture_t *capture = runtime_capture_hold(capture_of(stream));
  if (capture) {
    int member = runtime_stream_captured(stream)->member;
    capture->isInvalid = true;
    if (member == 0)
      tasks = capture_end(capture);
    else
      capture_forget_stream(capture, member);
  }
  (void)pthread_mutex_unlock(&captureLock);
  tasks_free(tasks);
  runtime_capture_drop(capture);
}

/* ---- capturing ---- */

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  enum cudaStreamCaptureMode before = captureMode;
  if ((unsigned)*mode > cudaStreamCaptureModeRelaxed) return runtime_error(cudaErrorInvalidValue);
  captureMode = *mode;
  *mode = before;
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  if (runtime_stream_is_null(stream)) return runtime_error(cudaErrorStreamCaptureUnsupported);
  if ((unsigned)mode > cudaStreamCaptureModeRelaxed) return runtime_error(cudaErrorInvalidValue);
  runtimeCapture_t *made = runtime_allocate(sizeof(*made));
  made->mode = mode;
  made->thread = pthread_self();
  made->graph = graph_make();
  (void)pthread_mutex_lock(&captureLock);
  bool isFree = !capture_of(stream);
  if (isFree) {
    (void)capture_add(made, stream);
    made->next = captures;
    captures = made;
    atomic_fetch_add(&nCaptures, 1);
  }
  (void)pthread_mutex_unlock(&captureLock);
  if (!isFree) {
    graph_drop(made->graph);
    free(made);
  }
  return runtime_error(isFree ? cudaSuccess : cudaErrorIllegalState);
}

/* Under the lock: how it may end from this stream. The first two leave it as it is. */
static cudaError_t capture_check_end(const runtimeCapture_t *capture, cudaStream_t stream, bool *goesOn) {
  *goesOn = true;
  if (capture->members[0].stream != stream) return cudaErrorStreamCaptureUnmatched;
  if (capture->mode != cudaStreamCaptureModeRelaxed && !capture_is_mine(capture))
    return cudaErrorStreamCaptureWrongThread;
  *goesOn = false;
  if (capture->isInvalid) return cudaErrorStreamCaptureInvalidated;
  return capture_is_loose(capture) ? cudaErrorStreamCaptureUnjoined : cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  cudaError_t error = cudaErrorIllegalState;
  bool goesOn = true;
  runtimeTask_t *tasks = NULL;
  *graph = NULL;
  (void)pthread_mutex_lock(&captureLock);
  runtimeCapture_t *capture = runtime_capture_hold(capture_of(stream));
  if (capture) error = capture_check_end(capture, stream, &goesOn);
  if (capture && !goesOn) tasks = capture_end(capture);
  (void)pthread_mutex_unlock(&captureLock);
  if (error == cudaSuccess) {
    *graph = graph_hold(capture->graph);
    graph_fill(*graph, tasks);
  } else {
    tasks_free(tasks);
  }
  runtime_capture_drop(capture);
  return runtime_error(error);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = cudaStreamCaptureStatusNone;
  if (!runtime_is_captured(stream)) return cudaSuccess;
  (void)pthread_mutex_lock(&captureLock);
  const runtimeCapture_t *capture = capture_of(stream);
  if (capture)
    *status = capture->isInvalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
  (void)pthread_mutex_unlock(&captureLock);
  return cudaSuccess;
}

/* The rest of what it can say is left out. */
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                     unsigned long long *id, cudaGraph_t *graph,
                                     const cudaGraphNode_t **dependencies, const cudaGraphEdgeData **edges,
                                     size_t *nDependencies) {
  if (id || dependencies || edges || nDependencies) return runtime_error(cudaErrorNotSupported);
  cudaError_t error = cudaStreamIsCapturing(stream, status);
  (void)pthread_mutex_lock(&captureLock);
  runtimeCapture_t *capture = capture_of(stream);
  if (graph) *graph = capture ? capture->graph : NULL;
  (void)pthread_mutex_unlock(&captureLock);
  return error;
}

/* ---- user objects ---- */

cudaError_t cudaUserObjectCreate(cudaUserObject_t *object, void *argument, cudaHostFn_t destroy,
                                 unsigned int count, unsigned int flags) {
  if (!object || !destroy || count == 0 || flags != cudaUserObjectNoDestructorSync)
    return runtime_error(cudaErrorInvalidValue);
  cudaUserObject_t made = runtime_allocate(sizeof(*made));
  atomic_init(&made->refs, (int)count);
  made->destroy = destroy;
  made->argument = argument;
  *object = made;
  return cudaSuccess;
}

cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned int count) {
  object_drop(object, count);
  return cudaSuccess;
}

cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned int count,
                                      unsigned int flags) {
  if (!graph || !object || count == 0) return runtime_error(cudaErrorInvalidValue);
  if (flags != cudaGraphUserObjectMove) atomic_fetch_add(&object->refs, (int)count);
  graphObject_t *kept = runtime_allocate(sizeof(*kept));
  *kept = (graphObject_t){.next = graph->objects, .object = object, .count = count};
  graph->objects = kept;
  return cudaSuccess;
}

/* ---- graphs ---- */

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  if (!graph) return runtime_error(cudaErrorInvalidValue);
  graph_drop(graph);
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags) {
  (void)flags;
  if (!exec || !graph) return runtime_error(cudaErrorInvalidValue);
  cudaGraphExec_t made = runtime_allocate(sizeof(*made));
  (void)pthread_mutex_init(&made->lock, NULL);
  made->graph = graph_hold(graph);
  *exec = made;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *exec, cudaGraph_t graph,
                                          unsigned long long flags) {
  return cudaGraphInstantiate(exec, graph, flags);
}

/* Launches that have not run yet keep what they need. */
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  if (!exec) return runtime_error(cudaErrorInvalidValue);
  runtime_mark_drop(exec->last);
  graph_drop(exec->graph);
  (void)pthread_mutex_destroy(&exec->lock);
  free(exec);
  return cudaSuccess;
}

cudaError_t cudaGraphUpload(cudaGraphExec_t exec, cudaStream_t stream) {
  if (!exec) return runtime_error(cudaErrorInvalidValue);
  return runtime_is_captured(stream) ? runtime_error(runtime_capture_refuse(stream)) : cudaSuccess;
}

/* Its marks are those of the nodes with events, in their order: made here, or waited for. */
typedef struct {
  cudaGraph_t graph;
  runtimeMark_t *before, *after, **marks;
} graphLaunch_t;

static void graph_launch_run(void *argument) {
  const graphLaunch_t *launch = argument;
  runtimeMark_t **mark = launch->marks;
  runtime_mark_wait(launch->before);
  for (runtimeTask_t *task = launch->graph->first; task; task = task->next) {
    if (!task->event)
      task->run(task->argument);
    else if (task->isRecord)
      runtime_mark_reach(*mark++);
    else
      runtime_mark_wait(*mark++);
  }
  runtime_mark_reach(launch->after);
}

static void graph_launch_drop(void *argument) {
  graphLaunch_t *launch = argument;
  for (int i = 0; i < launch->graph->nEvents; i++) runtime_mark_drop(launch->marks[i]);
  free(launch->marks);
  runtime_mark_drop(launch->before);
  runtime_mark_drop(launch->after);
  graph_drop(launch->graph);
}

/* What a node records from now on, or waits for as of now: that of an event recorded in a capture since is
 * nothing. */
static runtimeMark_t *graph_mark(const runtimeTask_t *node) {
  if (!node->isRecord) {
    runtimeRecord_t record = runtime_event_look(node->event);
    runtime_capture_drop(record.capture);
    return record.mark;
  }
  runtimeMark_t *mark = runtime_mark_make();
  runtime_event_set(node->event, (runtimeRecord_t){.mark = runtime_mark_hold(mark)});
  return mark;
}

/* Under the lock of the executable graph, so that launches are enqueued in the order of their marks. */
static cudaError_t graph_launch(cudaGraphExec_t exec, cudaStream_t stream) {
  runtimeTask_t *task = runtime_task_make(graph_launch_run, graph_launch_drop, sizeof(graphLaunch_t));
  graphLaunch_t *launch = (graphLaunch_t *)(void *)task->argument;
  int n = 0;
  *launch =
      (graphLaunch_t){.graph = graph_hold(exec->graph), .before = exec->last, .after = runtime_mark_make()};
  exec->last = runtime_mark_hold(launch->after);
  launch->marks = runtime_allocate(((size_t)exec->graph->nEvents + 1) * sizeof(runtimeMark_t *));
  for (const runtimeTask_t *node = exec->graph->first; node; node = node->next)
    if (node->event) launch->marks[n++] = graph_mark(node);
  return runtime_enqueue(stream, task);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  (void)runtime_device();
  if (!exec) return runtime_error(cudaErrorInvalidValue);
  /* CUDA makes it a node, which nothing here needs. */
  if (runtime_is_captured(stream)) return runtime_error(runtime_capture_refuse(stream));
  (void)pthread_mutex_lock(&exec->lock);
  cudaError_t error = graph_launch(exec, stream);
  (void)pthread_mutex_unlock(&exec->lock);
  return runtime_error(error);
}
