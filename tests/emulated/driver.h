/* What the two parts of the emulated CUDA driver say to each other. */
#ifndef ULTRAEP_TESTS_EMULATED_DRIVER_H_
#define ULTRAEP_TESTS_EMULATED_DRIVER_H_

#include <stdbool.h>

#pragma GCC visibility push(hidden)

/* The device of the thread's current context; false: it has none. */
bool driver_context(int *device);
bool driver_is_device(int device);

#pragma GCC visibility pop

#endif
