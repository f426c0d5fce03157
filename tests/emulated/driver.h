/* What the two parts of the emulated CUDA driver say to each other, and to the runtime. */
#ifndef ULTRAEP_TESTS_EMULATED_DRIVER_H_
#define ULTRAEP_TESTS_EMULATED_DRIVER_H_

#include <stdbool.h>

#pragma GCC visibility push(hidden)

/* The device of the thread's current context; false: it has none. */
bool driver_context(int *device);
/* The same of one that cuCtxPushCurrent put over the runtime's. */
bool driver_pushed(int *device);
/* Puts the device's context in place of it; false: there is none. */
bool driver_replace_pushed(int device);
/* The runtime uses the device's context, which is there from now on. */
void driver_use_context(int device);
bool driver_is_device(int device);
/* Peer access: whether it was enabled, from one device to the memory of the other. */
bool driver_reaches(int device, int other);

#pragma GCC visibility pop

#endif
