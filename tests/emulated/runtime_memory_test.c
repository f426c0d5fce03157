/* The emulated CUDA runtime by itself: memory and copies. */
#include "runtime_test.h"

#include <string.h>

#define BYTES ((size_t)100000)

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

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_memory),
      cmocka_unit_test(test_copies),
  };
  devices_set();
  return cmocka_run_group_tests_name("emulated_runtime_memory", tests, NULL, NULL);
}
