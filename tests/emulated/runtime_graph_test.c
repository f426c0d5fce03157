/* The emulated CUDA runtime by itself: capture and graphs, also from many threads at a time. */
#include "runtime_test.h"

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
      cmocka_unit_test(test_graph_fork),
      cmocka_unit_test(test_graph_external),
      cmocka_unit_test(test_capture_errors),
      cmocka_unit_test(test_threads),
  };
  devices_set();
  return cmocka_run_group_tests_name("emulated_runtime_graph", tests, NULL, NULL);
}
