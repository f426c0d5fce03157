#include "runtime_test.h"

#include <stdlib.h>

/* ---- a kernel ---- */

typedef struct {
  _Alignas(32) int64_t value[4];
} wide_t;

char kernelAddress;
struct kernelSeen kernelSeen;

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

cudaError_t kernel_launch(dim3 grid, dim3 block, char one, int64_t two, int64_t *sum, size_t shared,
                          cudaStream_t stream) {
  wide_t wide = {.value = {0, 0, 0, two}};
  void *arguments[] = {&one, &wide, &sum};
  return cudaLaunchKernel(&kernelAddress, grid, block, arguments, shared, stream);
}

/* ---- gates and logs ---- */

void gate_make(gate_t *gate) {
  *gate = (gate_t){.isOpen = false};
  (void)pthread_mutex_init(&gate->lock, NULL);
  (void)pthread_cond_init(&gate->changed, NULL);
}

void gate_open(gate_t *gate) {
  (void)pthread_mutex_lock(&gate->lock);
  gate->isOpen = true;
  (void)pthread_cond_broadcast(&gate->changed);
  (void)pthread_mutex_unlock(&gate->lock);
}

void CUDART_CB gate_pass(void *argument) {
  gate_t *gate = argument;
  (void)pthread_mutex_lock(&gate->lock);
  while (!gate->isOpen) (void)pthread_cond_wait(&gate->changed, &gate->lock);
  (void)pthread_mutex_unlock(&gate->lock);
}

void gate_free(gate_t *gate) {
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

cudaError_t note(cudaStream_t stream, int value) {
  return emulated_enqueue(stream, notes_add, &value, sizeof(value));
}

const char *notes_take(void) {
  static char text[sizeof(notes.entries) / sizeof(int) + 1];
  (void)pthread_mutex_lock(&notes.lock);
  for (int i = 0; i < notes.n; i++) text[i] = (char)('0' + notes.entries[i]);
  text[notes.n] = 0;
  notes.n = 0;
  (void)pthread_mutex_unlock(&notes.lock);
  return text;
}

cudaStream_t stream_make(void) {
  cudaStream_t stream;
  OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return stream;
}

cudaEvent_t event_make(void) {
  cudaEvent_t event;
  OK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  return event;
}

void devices_set(void) {
  (void)setenv("EMULATED_DEVICES", "2", 1);
  (void)unsetenv("EMULATED_SM");
}
