/* What the parts of the emulated CUDA runtime, and the driver beside it, share:
 *
 *   runtime.c          threads, devices, errors, kernels' launches
 *   runtime_memory.c   allocations and copies
 *   runtime_stream.c   streams and events
 *   runtime_graph.c    captures and graphs
 *
 * Where there is no memory for the emulation itself, it aborts: it is for tests only. */
#ifndef ULTRAEP_TESTS_EMULATED_RUNTIME_H_
#define ULTRAEP_TESTS_EMULATED_RUNTIME_H_

/* The functions with CUDA's names are seen from outside, whatever the build's flags say; those here are not.
 */
#pragma GCC visibility push(default)
#include "emulated.h"
#include <cuda.h>

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#pragma GCC visibility push(hidden)

enum { RUNTIME_MAX_DEVICES = 16, RUNTIME_ARGUMENT_ALIGNMENT = 64 };

/* ---- runtime.c ---- */

/* Returns the error; unless it only says "not ready" it is the thread's last one. */
cudaError_t runtime_error(cudaError_t error);
int runtime_devices(void);
/* The thread's device, for a call that makes the device's context current if none is. */
int runtime_device(void);
bool runtime_has_context(void);
void *runtime_allocate(size_t bytes);

/* ---- runtime_memory.c ---- */

extern const size_t runtimeMemoryTotal; /* that a device has */
size_t runtime_memory_unused(void);
/* Memory that is there without a range: what the driver makes, mapped or not. */
void runtime_memory_take(size_t bytes);
void runtime_memory_give(size_t bytes);
/* Not noted as the thread's last error, so that the driver can use it too. */
cudaError_t runtime_memory_make(emulatedMemory_t kind, int device, size_t bytes, void **ptr);
/* Frees what starts there and is of one of the kinds, bits 1 << kind. False: there is none. */
bool runtime_memory_free(void *ptr, unsigned kinds);
/* The memory file behind cudaMalloc's memory, which other processes map; -1 if there is none. */
int runtime_memory_file(const void *ptr);
/* An unnamed file of so many bytes, -1 on failure. */
int runtime_file_make(size_t bytes);
void runtime_poison(void *base, size_t bytes);

/* ---- runtime_stream.c ---- */

/* A point in a stream's work, once it is known: what an event stands for from one record to the next. */
typedef struct runtimeMark runtimeMark_t;
runtimeMark_t *runtime_mark_make(void);
runtimeMark_t *runtime_mark_hold(runtimeMark_t *mark); /* null stays null */
void runtime_mark_drop(runtimeMark_t *mark);
void runtime_mark_reach(runtimeMark_t *mark);
void runtime_mark_wait(runtimeMark_t *mark);

/* A piece of work: in a stream's queue it runs once, as a node of a graph any number of times. A node with an
 * event records it or waits for it, and has nothing else to run. */
typedef struct runtimeTask {
  struct runtimeTask *next;
  void (*run)(void *argument);
  void (*drop)(void *argument); /* null, or gives up what the argument refers to */
  cudaEvent_t event;
  bool isRecord;
  _Alignas(RUNTIME_ARGUMENT_ALIGNMENT) unsigned char argument[];
} runtimeTask_t;
/* The caller fills the argument's bytes. */
runtimeTask_t *runtime_task_make(void (*run)(void *), void (*drop)(void *), size_t bytes);
void runtime_task_free(runtimeTask_t *task);
/* Takes the task, also where it fails. */
cudaError_t runtime_enqueue(cudaStream_t stream, runtimeTask_t *task);
/* The null stream, by any of its names: what is enqueued there runs at once, on the calling thread. */
bool runtime_stream_is_null(cudaStream_t stream);
/* Of the null stream: the current one. */
int runtime_stream_device(cudaStream_t stream);

/* A stream's part in a capture, guarded by runtime_graph.c's lock but for a look whether there is one. */
typedef struct runtimeCapture runtimeCapture_t;
typedef struct {
  _Atomic(runtimeCapture_t *) capture; /* null: none; holds a reference */
  int member;                          /* its number in the capture */
} runtimeCaptured_t;
runtimeCaptured_t *runtime_stream_captured(cudaStream_t stream);

/* What was last recorded: a mark, or a place in a capture. */
typedef struct {
  runtimeMark_t *mark;
  runtimeCapture_t *capture;
  int member;
  uint64_t version; /* of the member */
} runtimeRecord_t;
void runtime_record_drop(runtimeRecord_t *record);
runtimeRecord_t runtime_event_look(cudaEvent_t event);
/* Takes the record's references. */
void runtime_event_set(cudaEvent_t event, runtimeRecord_t record);
void runtime_event_hold(cudaEvent_t event);
void runtime_event_drop(cudaEvent_t event);

/* ---- runtime_graph.c ---- */

runtimeCapture_t *runtime_capture_hold(runtimeCapture_t *capture); /* null stays null */
void runtime_capture_drop(runtimeCapture_t *capture);
bool runtime_is_captured(cudaStream_t stream);
/* Takes the task. */
cudaError_t runtime_capture_append(cudaStream_t stream, runtimeTask_t *task);
/* A record of an event in a stream that is captured. */
cudaError_t runtime_capture_record(cudaStream_t stream, cudaEvent_t event);
/* A wait for it in a stream that is captured, or becomes so. */
cudaError_t runtime_capture_wait(cudaStream_t stream, const runtimeRecord_t *record);
/* For a call that no captured stream permits: spoils the capture. */
cudaError_t runtime_capture_refuse(cudaStream_t stream);
/* Whether a capture forbids this thread what is unsafe in one, as allocating is; spoils that capture. */
bool runtime_capture_forbids(void);
/* The stream ends. */
void runtime_capture_leave(cudaStream_t stream);

#pragma GCC visibility pop

#endif
