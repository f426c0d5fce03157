#include "bench_job.h"

#include <stdlib.h>
#ifdef ULTRAEP_HAVE_MPI
#include <mpi.h>
#endif

benchJob_t benchJob = {.nProcesses = 1, .nLocalProcesses = 1};

int32_t benchJobProcesses(void) {
  static const char *const names[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"};
  for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
    const char *text = getenv(names[i]);
    int32_t count = text == NULL ? 1 : (int32_t)strtol(text, NULL, 10);
    if (count > 1) return count;
  }
  return 1;
}

#ifdef ULTRAEP_HAVE_MPI

static bool jobOpened;

int benchJobOpen(perfError_t *error) {
  int provided = 0, size = 1, rank = 0, localRank = 0, localSize = 1;
  MPI_Comm local;
  if (benchJobProcesses() == 1) return 0;
  /* MPI's own handler ends the program on any error. */
  MPI_Init_thread(NULL, NULL, MPI_THREAD_SERIALIZED, &provided);
  if (provided < MPI_THREAD_SERIALIZED) {
    MPI_Finalize();
    return perfErrorSet(error, "this MPI does not serve a second thread (MPI_THREAD_SERIALIZED)");
  }
  jobOpened = true;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank, MPI_INFO_NULL, &local);
  MPI_Comm_size(local, &localSize);
  MPI_Comm_rank(local, &localRank);
  MPI_Comm_free(&local);
  benchJob = (benchJob_t){
      .nProcesses = size, .process = rank, .localProcess = localRank, .nLocalProcesses = localSize};
  if (size == benchJobProcesses()) return 0;
  return perfErrorSet(error, "mpirun says %d processes, MPI %d: built with another MPI than this mpirun's",
                      benchJobProcesses(), size);
}

void benchJobClose(bool broken) {
  if (jobOpened && broken) MPI_Abort(MPI_COMM_WORLD, PERF_EXIT_FAILED);
  if (jobOpened) MPI_Finalize();
  jobOpened = false;
  benchJob = (benchJob_t){.nProcesses = 1, .nLocalProcesses = 1};
}

bool benchJobAny(bool mine) {
  int any = mine;
  if (benchJob.nProcesses > 1) MPI_Allreduce(MPI_IN_PLACE, &any, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
  return any != 0;
}

static double job_reduce(double mine, MPI_Op op) {
  if (benchJob.nProcesses > 1) MPI_Allreduce(MPI_IN_PLACE, &mine, 1, MPI_DOUBLE, op, MPI_COMM_WORLD);
  return mine;
}

double benchJobMax(double mine) {
  return job_reduce(mine, MPI_MAX);
}

double benchJobAdd(double mine) {
  return job_reduce(mine, MPI_SUM);
}

void benchJobSum(int64_t *values, int32_t count) {
  if (benchJob.nProcesses > 1)
    MPI_Allreduce(MPI_IN_PLACE, values, count, MPI_INT64_T, MPI_SUM, MPI_COMM_WORLD);
}

void benchJobSum32(uint32_t *values, size_t count) {
  if (benchJob.nProcesses > 1)
    MPI_Allreduce(MPI_IN_PLACE, values, (int)count, MPI_UINT32_T, MPI_SUM, MPI_COMM_WORLD);
}

void benchJobBroadcast(void *data, size_t bytes, int32_t process) {
  if (benchJob.nProcesses > 1) MPI_Bcast(data, (int)bytes, MPI_BYTE, process, MPI_COMM_WORLD);
}

#else

int benchJobOpen(perfError_t *error) {
  if (benchJobProcesses() == 1) return 0;
  return perfErrorSet(error,
                      "started by mpirun, but built without MPI: start one process with -t, or build where "
                      "CMake finds MPI");
}

void benchJobClose(bool broken) {
  (void)broken;
}

bool benchJobAny(bool mine) {
  return mine;
}

double benchJobMax(double mine) {
  return mine;
}

double benchJobAdd(double mine) {
  return mine;
}

void benchJobSum(int64_t *values, int32_t count) {
  (void)values;
  (void)count;
}

void benchJobSum32(uint32_t *values, size_t count) {
  (void)values;
  (void)count;
}

void benchJobBroadcast(void *data, size_t bytes, int32_t process) {
  (void)data;
  (void)bytes;
  (void)process;
}

#endif
