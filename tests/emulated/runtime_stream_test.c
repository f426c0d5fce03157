/* The emulated CUDA runtime by itself: errors, devices, streams, events and launches. */
#include "runtime_test.h"

#include <string.h>
#include <unistd.h>

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

static char strangerAddress;

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

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_errors), cmocka_unit_test(test_devices), cmocka_unit_test(test_streams),
      cmocka_unit_test(test_events), cmocka_unit_test(test_times),   cmocka_unit_test(test_launch),
  };
  devices_set();
  return cmocka_run_group_tests_name("emulated_runtime_stream", tests, NULL, NULL);
}
