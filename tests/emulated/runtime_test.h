/* What the tests of the emulated CUDA runtime share. A kernel here is a function of runtime_test_parts.c. */
#ifndef ULTRAEP_TESTS_EMULATED_RUNTIME_TEST_H_
#define ULTRAEP_TESTS_EMULATED_RUNTIME_TEST_H_

#include "emulated.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>

#include <cmocka.h>

#define OK(call) assert_int_equal(call, 0)
#define IS(call, error)                                                                                      \
  do {                                                                                                       \
    assert_int_equal(call, error);                                                                           \
    assert_int_equal(cudaGetLastError(), error);                                                             \
    assert_int_equal(cudaGetLastError(), cudaSuccess);                                                       \
  } while (0)

/* ---- a kernel ---- */

extern char kernelAddress;
extern struct kernelSeen {
  int nRuns;
  dim3 grid, block;
  size_t sharedBytes;
} kernelSeen;

/* *sum += one + two. */
cudaError_t kernel_launch(dim3 grid, dim3 block, char one, int64_t two, int64_t *sum, size_t shared,
                          cudaStream_t stream);

/* ---- gates and logs: what streams do, and when ---- */

typedef struct {
  pthread_mutex_t lock;
  pthread_cond_t changed;
  bool isOpen;
} gate_t;

void gate_make(gate_t *gate);
void gate_open(gate_t *gate);
void CUDART_CB gate_pass(void *argument);
void gate_free(gate_t *gate);

cudaError_t note(cudaStream_t stream, int value);
/* All that was noted, as digits. */
const char *notes_take(void);

cudaStream_t stream_make(void);
cudaEvent_t event_make(void);

/* Before the tests of a program: which devices there are. */
void devices_set(void);

#endif
