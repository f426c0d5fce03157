/* The emulated CUDA runtime by itself: a kernel here is a function of this file. */
#include "emulated.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define OK(call) assert_int_equal(call, 0)
#define IS(call, error)                                                                                      \
  do {                                                                                                       \
    assert_int_equal(call, error);                                                                           \
    assert_int_equal(cudaGetLastError(), error);                                                             \
    assert_int_equal(cudaGetLastError(), cudaSuccess);                                                       \
  } while (0)
#define BYTES ((size_t)100000)

/* ---- a kernel ---- */

typedef struct {
  _Alignas(32) int64_t value[4];
} wide_t;

static char kernelAddress, strangerAddress;
static struct {
  int nRuns;
  dim3 grid, block;
  size_t sharedBytes;
} kernelSeen;

static void kernel_run(const void *address, void *const *arguments) {
  assert_ptr_equal(address, &kernelAddress);
  const wide_t *wide = arguments[1];
  assert_int_equal((uintptr_t)wide % 32, 0);
  **(int64_t **)arguments[2] += *(const char *)arguments[0] + wide->value[3];
}

static const emulatedKernel_t kernel = {.address = &kernelAddress,
                                        .nArguments = 3,
                                        .bytes = {1, sizeof(wide_t), sizeof(int64_t *)},
                                        .alignment = {1, 32, 8},
                                        .run = kernel_run};

const emulatedKernel_t *emulated_kernel_find(const void *address) {
  return address == kernel.address ? &kernel : NULL;
}

void emulated_grid_run(const emulatedKernel_t *found, dim3 grid, dim3 block, size_t sharedBytes,
                       void *const *arguments) {
  kernelSeen.nRuns++;
  kernelSeen.grid = grid;
  kernelSeen.block = block;
  kernelSeen.sharedBytes = sharedBytes;
  found->run(found->address, arguments);
}

static cudaError_t kernel_launch(dim3 grid, dim3 block, char one, int64_t two, int64_t *sum, size_t shared,
                                 cudaStream_t stream) {
  wide_t wide = {.value = {0, 0, 0, two}};
  void *arguments[] = {&one, &wide, &sum};
  return cudaLaunchKernel(&kernelAddress, grid, block, arguments, shared, stream);
}

/* ---- gates and logs: what streams do, and when ---- */

typedef struct {
  pthread_mutex_t lock;
  pthread_cond_t changed;
  bool isOpen;
} gate_t;

static void gate_make(gate_t *gate) {
  *gate = (gate_t){.isOpen = false};
  (void)pthread_mutex_init(&gate->lock, NULL);
  (void)pthread_cond_init(&gate->changed, NULL);
}

static void gate_open(gate_t *gate) {
  (void)pthread_mutex_lock(&gate->lock);
  gate->isOpen = true;
  (void)pthread_cond_broadcast(&gate->changed);
  (void)pthread_mutex_unlock(&gate->lock);
}

static void CUDART_CB gate_pass(void *argument) {
  gate_t *gate = argument;
  (void)pthread_mutex_lock(&gate->lock);
  while (!gate->isOpen) (void)pthread_cond_wait(&gate->changed, &gate->lock);
  (void)pthread_mutex_unlock(&gate->lock);
}

static void gate_free(gate_t *gate) {
  (void)pthread_cond_destroy(&gate->changed);
  (void)pthread_mutex_destroy(&gate->lock);
}

static struct {
  pthread_mutex_t lock;
  int n, entries[4096];
} notes = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void notes_add(void *argument) {
  (void)pthread_mutex_lock(&notes.lock);
  notes.entries[notes.n++] = *(const int *)argument;
  (void)pthread_mutex_unlock(&notes.lock);
}

static cudaError_t note(cudaStream_t stream, int value) {
  return emulated_enqueue(stream, notes_add, &value, sizeof(value));
}

/* All that was noted, as digits. */
static const char *notes_take(void) {
  static char text[sizeof(notes.entries) / sizeof(int) + 1];
  (void)pthread_mutex_lock(&notes.lock);
  for (int i = 0; i < notes.n; i++) text[i] = (char)('0' + notes.entries[i]);
  text[notes.n] = 0;
  notes.n = 0;
  (void)pthread_mutex_unlock(&notes.lock);
  return text;
}

static cudaStream_t stream_make(void) {
  cudaStream_t stream;
  OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return stream;
}

static cudaEvent_t event_make(void) {
  cudaEvent_t event;
  OK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  return event;
}

/* ---- errors and devices ---- */

static void test_errors(void **state) {
  int value = 0;
  (void)state;
  IS(cudaSetDevice(7), cudaErrorInvalidDevice);
  assert_int_equal(cudaFree(&value), cudaErrorInvalidValue);
  assert_int_equal(cudaGetDevice(&value), cudaSuccess); /* a success forgets nothing */
  assert_int_equal(cudaPeekAtLastError(), cudaErrorInvalidValue);
  assert_int_equal(cudaGetLastError(), cudaErrorInvalidValue);
  assert_int_equal(cudaGetLastError(), cudaSuccess);
  assert_string_equal(cudaGetErrorString(cudaErrorNotReady), "device not ready");
  assert_string_equal(cudaGetErrorName(cudaErrorInvalidValue), "cudaErrorInvalidValue");
  assert_string_equal(cudaGetErrorString((cudaError_t)12345), "unrecognized error code");
}

static void *thread_device(void *argument) {
  (void)cudaGetDevice(argument);
  return NULL;
}

static void test_devices(void **state) {
  int value = 0;
  struct cudaDeviceProp properties;
  pthread_t thread;
  char bus[16];
  (void)state;
  OK(cudaGetDeviceCount(&value));
  assert_int_equal(value, 2);
  OK(cudaDeviceGetAttribute(&value, cudaDevAttrComputeCapabilityMajor, 0));
  assert_int_equal(value, 9);
  OK(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, 1));
  assert_int_equal(value, 232448);
  OK(cudaGetDeviceProperties(&properties, 1));
  OK(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 1));
  assert_true(properties.major == 9 && properties.multiProcessorCount == value);
  OK(cudaDeviceGetPCIBusId(bus, sizeof(bus), 1));
  IS(cudaDeviceGetPCIBusId(bus, 4, 1), cudaErrorInvalidValue);
  OK(cudaSetDevice(1));
  value = 5;
  OK(pthread_create(&thread, NULL, thread_device, &value));
  OK(pthread_join(thread, NULL));
  assert_int_equal(value, 0); /* each thread has its own */
  OK(cudaGetDevice(&value));
  assert_int_equal(value, 1);
  OK(cudaSetDevice(0));
}

/* ---- memory ---- */

static void check_new(const unsigned char *made, emulatedMemory_t kind) {
  emulatedRange_t range;
  assert_int_equal((uintptr_t)made % 512, 0);
  for (size_t i = 0; i < BYTES; i++) assert_int_equal(made[i], 0xCB);
  assert_true(emulated_range_find(made + BYTES - 1, &range));
  assert_true(range.base == made && range.bytes == BYTES && range.kind == kind && range.device == 0);
}

static void test_memory(void **state) {
  void *made = NULL, *mapped = NULL;
  size_t before, unused, total;
  emulatedRange_t first, second;
  (void)state;
  OK(cudaMemGetInfo(&before, &total));
  OK(cudaMalloc(&made, BYTES));
  check_new(made, EMULATED_MALLOC);
  assert_true(emulated_range_find(made, &first));
  assert_false(emulated_range_find((char *)made + BYTES, &second));
  OK(cudaMemGetInfo(&unused, &total));
  assert_int_equal(before - unused, BYTES);
  IS(cudaFree((char *)made + 1), cudaErrorInvalidValue);
  IS(cudaFreeHost(made), cudaErrorInvalidValue);
  OK(cudaFree(made));
  assert_false(emulated_range_find(made, &second));
  OK(cudaMalloc(&made, BYTES));
  assert_true(emulated_range_find(made, &second) && second.bufferId > first.bufferId && first.bufferId > 0);
  OK(cudaFree(made));
  OK(cudaMallocManaged(&made, BYTES, cudaMemAttachGlobal));
  check_new(made, EMULATED_MANAGED);
  OK(cudaFree(made));
  OK(cudaHostAlloc(&made, BYTES, cudaHostAllocMapped));
  check_new(made, EMULATED_HOST);
  OK(cudaHostGetDevicePointer(&mapped, made, 0));
  assert_ptr_equal(made, mapped);
  IS(cudaHostGetDevicePointer(&mapped, &made, 0), cudaErrorInvalidValue);
  OK(cudaFreeHost(made));
  OK(cudaMallocHost(&made, 1));
  OK(cudaFreeHost(made));
  OK(cudaMalloc(&made, 0));
  assert_null(made);
  OK(cudaFree(NULL));
  IS(cudaMalloc(&made, total + 1), cudaErrorMemoryAllocation);
  OK(cudaMemGetInfo(&unused, &total));
  assert_int_equal(before, unused);
  emulated_range_add(&total, sizeof(total), EMULATED_CUMEM, 1);
  assert_true(emulated_range_find(&total, &first) && first.device == 1 && first.kind == EMULATED_CUMEM);
  assert_true(emulated_range_remove(&total) && !emulated_range_remove(&total));
}

/* In the order of a stream, and from pageable memory as it was at the call. */
static void test_copies(void **state) {
  cudaStream_t stream = stream_make();
  gate_t gate;
  unsigned char *device = NULL, *pinned = NULL, host[101], back[101];
  (void)state;
  gate_make(&gate);
  OK(cudaMallocAsync((void **)&device, BYTES, stream));
  check_new(device, EMULATED_POOL);
  OK(cudaMallocHost((void **)&pinned, sizeof(host)));
  memset(host, 1, sizeof(host));
  memset(pinned, 1, sizeof(host));
  OK(cudaLaunchHostFunc(stream, gate_pass, &gate));
  OK(cudaMemcpyAsync(device + 1, host, sizeof(host), cudaMemcpyHostToDevice, stream));
  OK(cudaMemcpyAsync(device + 200, pinned, sizeof(host), cudaMemcpyDefault, stream));
  OK(cudaMemsetAsync(device + 3, 7, 50, stream));
  assert_int_equal(cudaStreamQuery(stream), cudaErrorNotReady);
  assert_int_equal(cudaGetLastError(), cudaSuccess);
  memset(host, 2, sizeof(host));
  memset(pinned, 2, sizeof(host));
  gate_open(&gate);
  OK(cudaMemcpyAsync(back, device + 1, sizeof(host), cudaMemcpyDeviceToHost, stream));
  OK(cudaStreamSynchronize(stream));
  OK(cudaStreamQuery(stream));
  for (int i = 0; i < (int)sizeof(back); i++) assert_int_equal(back[i], i >= 2 && i < 52 ? 7 : 1);
  OK(cudaMemcpy(back, device + 200, sizeof(host), cudaMemcpyDeviceToHost));
  for (int i = 0; i < (int)sizeof(back); i++) assert_int_equal(back[i], 2);
  assert_true(device[102] == 0xCB && device[0] == 0xCB && device[301] == 0xCB);
  OK(cudaMemset(device, 9, 11));
  assert_true(device[10] == 9 && device[11] == 7);
  IS(cudaMemset(host, 9, 11), cudaErrorInvalidValue);
  IS(cudaMemcpyAsync(host, back, 1, cudaMemcpyDeviceToHost, stream), cudaErrorInvalidValue);
  OK(cudaFreeAsync(device, stream));
  IS(cudaFreeAsync(device, stream), cudaErrorInvalidValue);
  OK(cudaFreeHost(pinned));
  OK(cudaStreamSynchronize(stream));
  OK(cudaStreamDestroy(stream));
  gate_free(&gate);
}

/* ---- streams and events ---- */

static void test_streams(void **state) {
  cudaStream_t streams[2] = {stream_make(), stream_make()};
  gate_t gate;
  (void)state;
  gate_make(&gate);
  for (int i = 0; i < 1000; i++) OK(note(streams[0], i % 10));
  OK(cudaStreamSynchronize(streams[0]));
  const char *text = notes_take();
  for (int i = 0; i < 1000; i++) assert_int_equal(text[i], '0' + i % 10);
  OK(cudaLaunchHostFunc(streams[0], gate_pass, &gate));
  OK(note(streams[0], 2));
  OK(note(streams[1], 1));
  OK(cudaStreamSynchronize(streams[1]));
  OK(note(NULL, 3)); /* at once */
  assert_string_equal(notes_take(), "13");
  OK(cudaStreamDestroy(streams[0])); /* what is pending still runs */
  gate_open(&gate);
  OK(cudaDeviceSynchronize());
  assert_string_equal(notes_take(), "2");
  OK(cudaStreamDestroy(streams[1]));
  OK(cudaStreamDestroy(stream_make())); /* never used */
  IS(cudaStreamDestroy(NULL), cudaErrorInvalidResourceHandle);
  gate_free(&gate);
}

static void test_events(void **state) {
  cudaStream_t streams[2] = {stream_make(), stream_make()};
  cudaEvent_t event = event_make(), other = event_make();
  gate_t gate, later;
  (void)state;
  gate_make(&gate);
  gate_make(&later);
  OK(cudaEventQuery(event)); /* never recorded: over, and nothing to wait for */
  OK(cudaEventSynchronize(event));
  OK(cudaStreamWaitEvent(streams[1], event, 0));
  OK(cudaLaunchHostFunc(streams[0], gate_pass, &gate));
  OK(note(streams[0], 1));
  OK(cudaEventRecord(event, streams[0]));
  assert_int_equal(cudaEventQuery(event), cudaErrorNotReady);
  OK(cudaStreamWaitEvent(streams[1], event, 0));
  OK(note(streams[1], 2));
  /* What is recorded later does not matter to the wait before. */
  OK(cudaLaunchHostFunc(streams[0], gate_pass, &later));
  OK(cudaEventRecord(event, streams[0]));
  OK(cudaEventRecord(other, streams[1]));
  gate_open(&gate);
  OK(cudaEventSynchronize(other));
  assert_string_equal(notes_take(), "12");
  assert_int_equal(cudaEventQuery(event), cudaErrorNotReady);
  OK(cudaStreamWaitEvent(streams[1], event, 0));
  OK(cudaEventDestroy(event)); /* the wait holds on to it */
  OK(note(streams[1], 4));
  OK(note(streams[0], 3));
  assert_int_equal(cudaStreamQuery(streams[1]), cudaErrorNotReady);
  gate_open(&later);
  for (int i = 0; i < 2; i++) OK(cudaStreamSynchronize(streams[i]));
  const char *text = notes_take();
  assert_true(strcmp(text, "34") == 0 || strcmp(text, "43") == 0);
  OK(cudaEventDestroy(other));
  for (int i = 0; i < 2; i++) OK(cudaStreamDestroy(streams[i]));
  gate_free(&later);
  gate_free(&gate);
}

static void CUDART_CB sleep_a_little(void *argument) {
  (void)argument;
  (void)usleep(20000);
}

static void test_times(void **state) {
  cudaStream_t stream = stream_make();
  cudaEvent_t from, to, untimed = event_make();
  float ms = 0;
  (void)state;
  OK(cudaEventCreate(&from));
  OK(cudaEventCreate(&to));
  IS(cudaEventElapsedTime(&ms, from, to), cudaErrorInvalidResourceHandle);
  OK(cudaEventRecord(from, stream));
  OK(cudaLaunchHostFunc(stream, sleep_a_little, NULL));
  OK(cudaEventRecord(to, stream));
  OK(cudaEventRecord(untimed, NULL));
  OK(cudaEventSynchronize(to));
  OK(cudaEventElapsedTime(&ms, from, to));
  assert_true(ms >= 19 && ms < 10000);
  IS(cudaEventElapsedTime(&ms, from, untimed), cudaErrorInvalidResourceHandle);
  IS(cudaEventRecordWithFlags(to, stream, cudaEventRecordExternal), cudaErrorInvalidValue);
  IS(cudaStreamWaitEvent(stream, to, cudaEventWaitExternal), cudaErrorInvalidValue);
  OK(cudaEventDestroy(from));
  OK(cudaEventDestroy(to));
  OK(cudaEventDestroy(untimed));
  OK(cudaStreamDestroy(stream));
}

/* ---- kernels ---- */

static void test_launch(void **state) {
  cudaStream_t stream = stream_make();
  struct cudaFuncAttributes attributes;
  int64_t *sum = NULL;
  void *none[1] = {NULL};
  (void)state;
  OK(cudaMallocManaged((void **)&sum, sizeof(*sum), cudaMemAttachGlobal));
  *sum = 0;
  OK(kernel_launch((dim3){2, 3, 4}, (dim3){32, 2, 1}, 1, 10, sum, 100, stream));
  OK(kernel_launch((dim3){1, 1, 1}, (dim3){1024, 1, 1}, 2, 20, sum, 48 << 10, stream));
  OK(cudaStreamSynchronize(stream));
  assert_int_equal(*sum, 33);
  assert_true(kernelSeen.block.x == 1024 && kernelSeen.grid.x == 1 && kernelSeen.sharedBytes == 48 << 10);
  IS(kernel_launch((dim3){1, 1, 1}, (dim3){1024, 2, 1}, 1, 1, sum, 0, stream), cudaErrorInvalidConfiguration);
  IS(kernel_launch((dim3){0, 1, 1}, (dim3){1, 1, 1}, 1, 1, sum, 0, stream), cudaErrorInvalidConfiguration);
  IS(kernel_launch((dim3){1, 1, 1}, (dim3){1, 1, 1}, 1, 1, sum, 50000, stream), cudaErrorInvalidValue);
  IS(cudaFuncSetAttribute(&kernelAddress, cudaFuncAttributeMaxDynamicSharedMemorySize, 232449),
     cudaErrorInvalidValue);
  OK(cudaFuncSetAttribute(&kernelAddress, cudaFuncAttributeMaxDynamicSharedMemorySize, 50000));
  OK(kernel_launch((dim3){1, 1, 1}, (dim3){1, 1, 1}, 1, 1, sum, 50000, NULL));
  assert_int_equal(*sum, 35);
  OK(cudaFuncGetAttributes(&attributes, &kernelAddress));
  assert_int_equal(attributes.maxThreadsPerBlock, 1024);
  IS(cudaFuncGetAttributes(&attributes, &strangerAddress), cudaErrorInvalidDeviceFunction);
  IS(cudaFuncSetAttribute(&strangerAddress, cudaFuncAttributeMaxDynamicSharedMemorySize, 1),
     cudaErrorInvalidDeviceFunction);
  IS(cudaLaunchKernel(&strangerAddress, (dim3){1, 1, 1}, (dim3){1, 1, 1}, none, 0, stream),
     cudaErrorInvalidDeviceFunction);
  assert_int_equal(kernelSeen.nRuns, 3);
  OK(cudaStreamDestroy(stream));
  OK(cudaFree(sum));
}

/* ---- graphs ---- */

static void capture_begin(cudaStream_t stream) {
  OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
}

static cudaGraphExec_t capture_end(cudaStream_t stream) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  OK(cudaStreamEndCapture(stream, &graph));
  OK(cudaGraphInstantiate(&exec, graph, 0));
  OK(cudaGraphDestroy(graph));
  OK(cudaGraphUpload(exec, stream));
  return exec;
}

static enum cudaStreamCaptureStatus capture_status(cudaStream_t stream) {
  enum cudaStreamCaptureStatus status;
  OK(cudaStreamIsCapturing(stream, &status));
  return status;
}

static void check_spoiled(cudaStream_t stream, cudaError_t error) {
  cudaGraph_t graph;
  IS(cudaStreamEndCapture(stream, &graph), error);
  assert_int_equal(capture_status(stream), cudaStreamCaptureStatusNone);
}

/* A second stream joins the capture and is joined to the first again. */
static void capture_fork(cudaStream_t streams[2], cudaEvent_t event, int64_t *sum) {
  capture_begin(streams[0]);
  OK(cudaMemsetAsync(sum, 0, sizeof(*sum), streams[0]));
  OK(note(streams[0], 1));
  OK(cudaEventRecord(event, streams[0]));
  assert_int_equal(capture_status(streams[1]), cudaStreamCaptureStatusNone);
  OK(cudaStreamWaitEvent(streams[1], event, 0));
  assert_int_equal(capture_status(streams[1]), cudaStreamCaptureStatusActive);
  OK(kernel_launch((dim3){1, 1, 1}, (dim3){32, 1, 1}, 3, 4, sum, 0, streams[1]));
  OK(note(streams[1], 2));
  OK(cudaEventRecord(event, streams[1]));
  OK(cudaStreamWaitEvent(streams[0], event, 0));
  OK(note(streams[0], 3));
  OK(cudaEventRecord(event, streams[0]));
  OK(cudaStreamWaitEvent(streams[1], event, 0)); /* nothing follows: nothing to join */
}

static void test_graph_fork(void **state) {
  cudaStream_t streams[2] = {stream_make(), stream_make()};
  cudaEvent_t event = event_make();
  int64_t *sum = NULL;
  (void)state;
  OK(cudaMallocManaged((void **)&sum, sizeof(*sum), cudaMemAttachGlobal));
  capture_fork(streams, event, sum);
  IS(cudaEventQuery(event), cudaErrorStreamCaptureUnsupported);
  check_spoiled(streams[0], cudaErrorStreamCaptureInvalidated);
  IS(cudaEventQuery(event), cudaErrorCapturedEvent);
  IS(cudaStreamWaitEvent(streams[1], event, 0), cudaErrorCapturedEvent);
  capture_fork(streams, event, sum);
  cudaGraphExec_t exec = capture_end(streams[0]);
  assert_int_equal(capture_status(streams[1]), cudaStreamCaptureStatusNone);
  assert_string_equal(notes_take(), ""); /* nothing ran */
  for (int i = 0; i < 3; i++) OK(cudaGraphLaunch(exec, streams[i % 2]));
  OK(cudaGraphExecDestroy(exec)); /* launches hold on to it */
  for (int i = 0; i < 2; i++) OK(cudaStreamSynchronize(streams[i]));
  assert_string_equal(notes_take(), "123123123");
  assert_int_equal(*sum, 7);
  OK(cudaEventDestroy(event));
  for (int i = 0; i < 2; i++) OK(cudaStreamDestroy(streams[i]));
  OK(cudaFree(sum));
}

/* Launches that wait for what came before them at an event, and are waited for at it by what comes after. */
static void test_graph_external(void **state) {
  cudaStream_t streams[2] = {stream_make(), stream_make()};
  cudaEvent_t event = event_make();
  gate_t gate;
  (void)state;
  gate_make(&gate);
  capture_begin(streams[0]);
  OK(cudaStreamWaitEvent(streams[0], event, cudaEventWaitExternal));
  OK(note(streams[0], 2));
  OK(cudaEventRecordWithFlags(event, streams[0], cudaEventRecordExternal));
  cudaGraphExec_t exec = capture_end(streams[0]);
  OK(cudaGraphLaunch(exec, streams[0])); /* with nothing to wait for */
  OK(cudaStreamSynchronize(streams[0]));
  assert_string_equal(notes_take(), "2");
  OK(cudaLaunchHostFunc(streams[1], gate_pass, &gate));
  OK(note(streams[1], 1));
  OK(cudaEventRecord(event, streams[1]));
  for (int i = 0; i < 2; i++) OK(cudaGraphLaunch(exec, streams[0]));
  OK(cudaStreamWaitEvent(streams[1], event, 0));
  OK(note(streams[1], 3));
  OK(cudaEventDestroy(event));
  gate_open(&gate);
  OK(cudaStreamSynchronize(streams[1]));
  assert_string_equal(notes_take(), "1223");
  OK(cudaGraphLaunch(exec, NULL));
  assert_string_equal(notes_take(), "2");
  OK(cudaGraphExecDestroy(exec));
  for (int i = 0; i < 2; i++) OK(cudaStreamDestroy(streams[i]));
  gate_free(&gate);
}

static void *thread_end_capture(void *argument) {
  cudaGraph_t graph;
  return (void *)(intptr_t)cudaStreamEndCapture(argument, &graph);
}

static void test_capture_errors(void **state) {
  cudaStream_t streams[2] = {stream_make(), stream_make()};
  cudaEvent_t event = event_make(), outside = event_make();
  void *made = NULL;
  pthread_t thread;
  enum cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  (void)state;
  check_spoiled(streams[0], cudaErrorIllegalState);
  IS(cudaStreamBeginCapture(NULL, cudaStreamCaptureModeGlobal), cudaErrorStreamCaptureUnsupported);
  capture_begin(streams[0]);
  IS(cudaStreamBeginCapture(streams[0], cudaStreamCaptureModeGlobal), cudaErrorIllegalState);
  IS(cudaStreamSynchronize(streams[0]), cudaErrorStreamCaptureUnsupported);
  assert_int_equal(capture_status(streams[0]), cudaStreamCaptureStatusInvalidated);
  IS(note(streams[0], 1), cudaErrorStreamCaptureInvalidated);
  check_spoiled(streams[0], cudaErrorStreamCaptureInvalidated);
  capture_begin(streams[0]);
  IS(cudaStreamQuery(streams[0]), cudaErrorStreamCaptureUnsupported);
  check_spoiled(streams[0], cudaErrorStreamCaptureInvalidated);
  capture_begin(streams[0]);
  OK(cudaStreamQuery(streams[1]));
  IS(cudaMalloc(&made, 1), cudaErrorStreamCaptureUnsupported);
  check_spoiled(streams[0], cudaErrorStreamCaptureInvalidated);
  /* A relaxed thread may. */
  capture_begin(streams[0]);
  OK(cudaThreadExchangeStreamCaptureMode(&mode));
  OK(cudaMalloc(&made, 1));
  OK(cudaFree(made));
  OK(cudaThreadExchangeStreamCaptureMode(&mode));
  /* Neither another stream nor another thread may end it. */
  OK(cudaEventRecord(event, streams[0]));
  OK(cudaStreamWaitEvent(streams[1], event, 0));
  cudaGraph_t graph;
  IS(cudaStreamEndCapture(streams[1], &graph), cudaErrorStreamCaptureUnmatched);
  OK(pthread_create(&thread, NULL, thread_end_capture, streams[0]));
  OK(pthread_join(thread, &made));
  assert_int_equal((intptr_t)made, cudaErrorStreamCaptureWrongThread);
  OK(note(streams[1], 1));
  check_spoiled(streams[0], cudaErrorStreamCaptureUnjoined);
  /* On work outside. */
  OK(cudaEventRecord(outside, streams[1]));
  capture_begin(streams[0]);
  IS(cudaStreamWaitEvent(streams[0], outside, 0), cudaErrorStreamCaptureIsolation);
  check_spoiled(streams[0], cudaErrorStreamCaptureInvalidated);
  /* On another capture. */
  for (int i = 0; i < 2; i++) capture_begin(streams[i]);
  OK(cudaEventRecord(event, streams[0]));
  IS(cudaStreamWaitEvent(streams[1], event, 0), cudaErrorStreamCaptureMerge);
  for (int i = 0; i < 2; i++) check_spoiled(streams[i], cudaErrorStreamCaptureInvalidated);
  /* An event that is in the list, and whose last record is there too. */
  capture_begin(streams[0]);
  OK(cudaEventRecordWithFlags(event, streams[0], cudaEventRecordExternal));
  OK(cudaEventRecord(event, streams[0]));
  OK(cudaStreamDestroy(streams[0]));
  OK(cudaEventDestroy(event));
  OK(cudaEventDestroy(outside));
  OK(cudaStreamDestroy(streams[1]));
  assert_string_equal(notes_take(), "");
}

/* ---- many threads at a time ---- */

enum { THREADS = 4, ROUNDS = 50 };

typedef struct {
  cudaGraphExec_t exec; /* launched by all, in streams of their own */
  cudaEvent_t event;    /* recorded and waited for by all */
} shared_t;

static int nLaunches; /* of the graph: its launches never overlap */

static void launches_count(void *argument) {
  (void)argument;
  nLaunches++;
}

static void *thread_rounds(void *argument) {
  const shared_t *shared = argument;
  for (int i = 0; i < ROUNDS; i++) {
    cudaStream_t stream = stream_make();
    void *made[2] = {NULL, NULL};
    OK(cudaMallocAsync(&made[0], 1000, stream));
    OK(cudaMalloc(&made[1], 1000));
    OK(cudaMemsetAsync(made[0], i, 1000, stream));
    OK(cudaStreamWaitEvent(stream, shared->event, 0));
    OK(cudaGraphLaunch(shared->exec, stream));
    OK(cudaEventRecord(shared->event, stream));
    OK(cudaMemcpyAsync(made[1], made[0], 1000, cudaMemcpyDeviceToDevice, stream));
    OK(cudaFreeAsync(made[0], stream));
    if (i % 3 == 0) OK(cudaDeviceSynchronize());
    OK(cudaStreamSynchronize(stream));
    assert_int_equal(((unsigned char *)made[1])[999], i);
    OK(cudaFree(made[1]));
    OK(cudaStreamDestroy(stream));
  }
  return NULL;
}

static void test_threads(void **state) {
  pthread_t threads[THREADS];
  cudaStream_t stream = stream_make();
  shared_t shared = {.event = event_make()};
  (void)state;
  nLaunches = 0;
  capture_begin(stream);
  OK(emulated_enqueue(stream, launches_count, NULL, 0));
  shared.exec = capture_end(stream);
  for (int i = 0; i < THREADS; i++) OK(pthread_create(&threads[i], NULL, thread_rounds, &shared));
  for (int i = 0; i < THREADS; i++) OK(pthread_join(threads[i], NULL));
  assert_int_equal(nLaunches, THREADS * ROUNDS);
  OK(cudaGraphExecDestroy(shared.exec));
  OK(cudaEventDestroy(shared.event));
  OK(cudaStreamDestroy(stream));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_errors),         cmocka_unit_test(test_devices),
      cmocka_unit_test(test_memory),         cmocka_unit_test(test_copies),
      cmocka_unit_test(test_streams),        cmocka_unit_test(test_events),
      cmocka_unit_test(test_times),          cmocka_unit_test(test_launch),
      cmocka_unit_test(test_graph_fork),     cmocka_unit_test(test_graph_external),
      cmocka_unit_test(test_capture_errors), cmocka_unit_test(test_threads),
  };
  (void)setenv("EMULATED_DEVICES", "2", 1);
  (void)unsetenv("EMULATED_SM");
  return cmocka_run_group_tests_name("emulated_runtime", tests, NULL, NULL);
}
