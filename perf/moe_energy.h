/* What a GPU has used, as NVML counts it. */
#ifndef ULTRAEP_PERF_MOE_ENERGY_H_
#define ULTRAEP_PERF_MOE_ENERGY_H_

#include <stdint.h>

/* Millijoules since the driver was loaded, of a CUDA device; -1 where NVML is not there or does not count
 * them. */
int64_t moeEnergyRead(int device);

#endif
