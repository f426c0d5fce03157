/* The processes of a run: one, or those that mpirun started. Collective calls, made by every process in the
 * same order; with one process they do nothing. */
#ifndef ULTRAEP_PERF_BENCH_JOB_H_
#define ULTRAEP_PERF_BENCH_JOB_H_

#include "options.h"

typedef struct {
  int32_t nProcesses, process;
  int32_t localProcess, nLocalProcesses; /* among those on this machine */
} benchJob_t;

extern benchJob_t benchJob;

/* Processes that mpirun says it started; 1 without it. Known before benchJobOpen. */
int32_t benchJobProcesses(void);
int benchJobOpen(perfError_t *error);
/* broken: this process has failed, the others may wait for it and are ended. */
void benchJobClose(bool broken);
bool benchJobAny(bool mine);
double benchJobMax(double mine);
double benchJobAdd(double mine); /* the sum over all processes */
void benchJobSum(int64_t *values, int32_t count);
void benchJobSum32(uint32_t *values, size_t count);
/* From the given process to all. */
void benchJobBroadcast(void *data, size_t bytes, int32_t process);

#endif
