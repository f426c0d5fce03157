/* The GPUs and NCCL's communicators that all runs of ultraep_perf share. */
#include "bench_cuda.h"
#include "bench_job.h"
#include "cuda_call.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

benchCuda_t benchCuda;

int benchCudaDevice(int32_t local) {
  int32_t onMachine = benchJob.nProcesses > 1 ? benchJob.localProcess : local;
  return onMachine % benchCuda.nDevices;
}

/* ---- devices ---- */

static int machine_devices_find(const benchOptions_t *options, perfError_t *error) {
  int count = 0;
  int32_t onMachine = benchJob.nProcesses > 1 ? benchJob.nLocalProcesses : options->nRanks;
  /* Read when CUDA starts: the queues of one process's ranks must not wait for one another. */
  if (benchJob.nProcesses == 1) setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
  cudaError_t found = cudaGetDeviceCount(&count);
  if (found != cudaSuccess || count == 0)
    return perfErrorSet(error, "no CUDA device can be used: %s; -B host runs without one",
                        found == cudaSuccess ? "there is none" : cudaGetErrorString(found));
  benchCuda.nRanks = options->nRanks;
  benchCuda.firstRank = benchJob.nProcesses > 1 ? benchJob.process : 0;
  benchCuda.nLocal = benchJob.nProcesses > 1 ? 1 : options->nRanks;
  benchCuda.nDevices = count < onMachine ? count : onMachine;
  return 0;
}

/* What NCCL reads when it is loaded; the user's own settings stand. */
static void machine_environment_set(const benchOptions_t *options) {
  int32_t onMachine = benchJob.nProcesses > 1 ? benchJob.nLocalProcesses : options->nRanks;
  char ctas[16];
  /* NVLink multicast, which send and receive do not need. */
  setenv("NCCL_NVLS_ENABLE", "0", 0);
  if (onMachine <= benchCuda.nDevices) return;
  /* Kernels of all ranks of a GPU must fit on it together. The baseline gets as much of it as the library. */
  snprintf(ctas, sizeof(ctas), "%d",
           options->baseline == BENCH_BASELINE_NONE ? 4
           : options->maxCtas > 0                   ? options->maxCtas
                                                    : 16);
  setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1", 0);
  setenv("NCCL_MAX_CTAS", ctas, 0);
}

/* Contexts of all devices used. */
static int machine_contexts_make(perfError_t *error) {
  benchCuda.freeBefore = calloc((size_t)benchCuda.nDevices, sizeof(benchCuda.freeBefore[0]));
  if (benchCuda.freeBefore == NULL)
    return perfErrorSet(error, "no memory for %d devices", benchCuda.nDevices);
  for (int32_t local = 0; local < benchCuda.nLocal && local < benchCuda.nDevices; local++) {
    PERF_CUDA(error, cudaSetDevice(benchCudaDevice(local)));
    PERF_CUDA(error, cudaFree(NULL));
  }
  return 0;
}

/* The ranks' streams. Streams share the few queues of a device, and a rank's kernels must not stand in one
 * queue behind a peer's that wait for them: so these are made one after the other, before NCCL makes its own.
 */
static int machine_streams_make(perfError_t *error) {
  benchCuda.streams = calloc((size_t)benchCuda.nLocal, sizeof(benchCuda.streams[0]));
  if (benchCuda.streams == NULL) return perfErrorSet(error, "no memory for %d streams", benchCuda.nLocal);
  for (int32_t local = 0; local < benchCuda.nLocal; local++) {
    PERF_CUDA(error, cudaSetDevice(benchCudaDevice(local)));
    PERF_CUDA(error, cudaStreamCreateWithFlags(&benchCuda.streams[local], cudaStreamNonBlocking));
  }
  return 0;
}

/* How much of each device is free, with the contexts of all processes made. */
static int machine_memory_look(perfError_t *error) {
  size_t total = 0, unused = 0;
  for (int32_t local = 0; local < benchCuda.nLocal && local < benchCuda.nDevices; local++) {
    PERF_CUDA(error, cudaSetDevice(benchCudaDevice(local)));
    PERF_CUDA(error, cudaMemGetInfo(&unused, &total));
    benchCuda.freeBefore[benchCudaDevice(local)] = (int64_t)unused;
  }
  return 0;
}

/* ---- copy rate ---- */

enum { COPY_BYTES = 1 << 30, COPY_ROUNDS = 10 };

static int machine_copies_time(uint8_t *memory, size_t bytes, cudaStream_t stream, cudaEvent_t *events,
                               double *rate, perfError_t *error) {
  double seconds[COPY_ROUNDS];
  float ms = 0;
  PERF_CUDA(error, cudaMemsetAsync(memory, 1, 2 * bytes, stream));
  for (int i = 0; i <= COPY_ROUNDS; i++) {
    PERF_CUDA(error, cudaMemcpyAsync(memory + bytes, memory, bytes, cudaMemcpyDeviceToDevice, stream));
    PERF_CUDA(error, cudaEventRecord(events[i], stream));
  }
  PERF_CUDA(error, cudaStreamSynchronize(stream));
  for (int i = 0; i < COPY_ROUNDS; i++) {
    PERF_CUDA(error, cudaEventElapsedTime(&ms, events[i], events[i + 1]));
    seconds[i] = ms / 1e3;
  }
  *rate = 2.0 * (double)bytes / perfMedian(seconds, COPY_ROUNDS);
  return 0;
}

/* Bytes read and written a second by one large copy within the first GPU, which nothing else uses by now. */
static int machine_copy_rate_find(double *rate, perfError_t *error) {
  uint8_t *memory = NULL;
  size_t bytes = COPY_BYTES;
  cudaStream_t stream = NULL;
  cudaEvent_t events[COPY_ROUNDS + 1] = {NULL};
  while (bytes > 1 << 20 && 4 * bytes > (size_t)benchCuda.freeBefore[benchCudaDevice(0)]) bytes /= 2;
  PERF_CUDA(error, cudaSetDevice(benchCudaDevice(0)));
  PERF_CUDA(error, cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  cudaError_t made = cudaMalloc((void **)&memory, 2 * bytes);
  for (int i = 0; i <= COPY_ROUNDS && made == cudaSuccess; i++) made = cudaEventCreate(&events[i]);
  int status = made == cudaSuccess ? machine_copies_time(memory, bytes, stream, events, rate, error)
                                   : perfErrorSet(error, "copy rate: %s", cudaGetErrorString(made));
  for (int i = 0; i <= COPY_ROUNDS && events[i] != NULL; i++) cudaEventDestroy(events[i]);
  cudaFree(memory);
  cudaStreamDestroy(stream);
  return status;
}

/* ---- communicators ---- */

typedef struct {
  int32_t local;
  ncclLoaderId_t id;
  pthread_t thread;
  bool started;
  perfError_t error;
} machineRank_t;

static void *machine_comm_make(void *argument) {
  machineRank_t *self = argument;
  cudaError_t set = cudaSetDevice(benchCudaDevice(self->local));
  if (set != cudaSuccess) {
    perfErrorSet(&self->error, "cudaSetDevice: %s", cudaGetErrorString(set));
    return NULL;
  }
  int made = benchCuda.nccl.CommInitRank(&benchCuda.comms[self->local], benchCuda.nRanks, self->id,
                                         benchCuda.firstRank + self->local);
  if (made != 0) {
    perfErrorSet(&self->error, "rank %d: ncclCommInitRank: %s", benchCuda.firstRank + self->local,
                 benchCuda.nccl.GetErrorString(made));
    benchCuda.comms[self->local] = NULL;
  }
  return NULL;
}

static void *machine_comm_destroy(void *argument) {
  machineRank_t *self = argument;
  if (cudaSetDevice(benchCudaDevice(self->local)) == cudaSuccess)
    benchCuda.nccl.CommDestroy(benchCuda.comms[self->local]);
  return NULL;
}

/* Runs a thread for each rank of this process. The first error found. */
static int machine_ranks_run(void *(*work)(void *), const ncclLoaderId_t *id, perfError_t *error) {
  machineRank_t *ranks = calloc((size_t)benchCuda.nLocal, sizeof(ranks[0]));
  int status = 0;
  if (ranks == NULL) return perfErrorSet(error, "no memory for %d ranks", benchCuda.nLocal);
  for (int32_t i = 0; i < benchCuda.nLocal; i++) {
    ranks[i] = (machineRank_t){.local = i};
    if (id != NULL) ranks[i].id = *id;
    ranks[i].started = pthread_create(&ranks[i].thread, NULL, work, &ranks[i]) == 0;
    /* The others wait for it in NCCL, and cannot be called back. */
    if (!ranks[i].started) {
      fprintf(stderr, "ultraep_perf: no thread for rank %d\n", i);
      exit(PERF_EXIT_FAILED);
    }
  }
  for (int32_t i = 0; i < benchCuda.nLocal; i++) {
    pthread_join(ranks[i].thread, NULL);
    if (status != 0 || ranks[i].error.text[0] == '\0') continue;
    *error = ranks[i].error;
    status = -1;
  }
  free(ranks);
  return status;
}

static int machine_comms_make(perfError_t *error) {
  ncclLoaderId_t id = {{0}};
  benchCuda.comms = calloc((size_t)benchCuda.nLocal, sizeof(benchCuda.comms[0]));
  int made = benchJob.process == 0 ? benchCuda.nccl.GetUniqueId(&id) : 0;
  bool missing = benchCuda.comms == NULL || made != 0;
  if (benchJobAny(missing)) {
    return missing ? perfErrorSet(error, "ncclGetUniqueId: %s", benchCuda.nccl.GetErrorString(made)) : -1;
  }
  benchJobBroadcast(&id, sizeof(id), 0);
  return machine_ranks_run(machine_comm_make, &id, error);
}

/* ---- all of it ---- */

double benchCudaMemoryThere(const char **what) {
  double sum = 0;
  *what = "the GPUs have free";
  for (int32_t local = 0; local < benchCuda.nLocal && local < benchCuda.nDevices; local++)
    sum += (double)benchCuda.freeBefore[benchCudaDevice(local)];
  if (benchJob.nProcesses > 1) { /* a GPU's share */
    int32_t sharing = (benchJob.nLocalProcesses + benchCuda.nDevices - 1) / benchCuda.nDevices;
    sum /= sharing;
  }
  return sum;
}

/* One rank of each GPU counts for it: the first. */
bool benchCudaCounts(int32_t local) {
  return (benchJob.nProcesses > 1 ? benchJob.localProcess : local) < benchCuda.nDevices;
}

static int64_t machine_used(int device) {
  size_t unused = 0, total = 0;
  if (cudaSetDevice(device) != cudaSuccess || cudaMemGetInfo(&unused, &total) != cudaSuccess) return 0;
  return benchCuda.freeBefore[device] - (int64_t)unused;
}

int64_t benchCudaMemoryUsed(benchRank_t *rank) {
  return benchCudaCounts(rank->local) ? machine_used(benchCudaDevice(rank->local)) : 0;
}

static int machine_describe(benchMachine_t *machine, perfError_t *error) {
  struct cudaDeviceProp properties;
  int64_t sums[2] = {0, 0}; /* devices, bytes */
  PERF_CUDA(error, cudaGetDeviceProperties(&properties, benchCudaDevice(0)));
  for (int32_t local = 0; local < benchCuda.nLocal; local++) {
    if (!benchCudaCounts(local)) continue;
    sums[0]++;
    sums[1] += machine_used(benchCudaDevice(local));
  }
  benchJobSum(sums, 2);
  snprintf(machine->device, sizeof(machine->device), "%.63s", properties.name);
  machine->nDevices = (int32_t)sums[0];
  machine->commBytes = sums[1];
  machine->ncclVersion = benchCuda.nccl.version;
  return 0;
}

/* True where a step has worked in all processes; where not, theirs fail too, without a message of their own.
 */
static bool machine_agreed(int status) {
  return !benchJobAny(status != 0);
}

int benchCudaOpen(const benchOptions_t *options, benchMachine_t *machine, perfError_t *error) {
  int status = machine_devices_find(options, error);
  if (status == 0) machine_environment_set(options);
  if (status == 0) status = ncclLoaderOpen(&benchCuda.nccl, error);
  if (!machine_agreed(status)) return -1;
  if (!machine_agreed(machine_contexts_make(error))) return -1;
  if (!machine_agreed(machine_streams_make(error))) return -1;
  if (!machine_agreed(machine_memory_look(error))) return -1;
  /* One at a time: processes may share a GPU. */
  status = benchJob.process == 0 ? machine_copy_rate_find(&machine->copyRate, error) : 0;
  if (!machine_agreed(status)) return -1;
  benchJobBroadcast(&machine->copyRate, sizeof(machine->copyRate), 0);
  if (!machine_agreed(machine_comms_make(error))) return -1;
  return machine_agreed(machine_describe(machine, error)) ? 0 : -1;
}

void benchCudaClose(void) {
  perfError_t error;
  bool whole = benchCuda.comms != NULL;
  for (int32_t i = 0; whole && i < benchCuda.nLocal; i++) whole = benchCuda.comms[i] != NULL;
  if (whole) (void)machine_ranks_run(machine_comm_destroy, NULL, &error);
  for (int32_t i = 0; benchCuda.streams != NULL && i < benchCuda.nLocal; i++) {
    if (benchCuda.streams[i] != NULL) cudaStreamDestroy(benchCuda.streams[i]);
  }
  free(benchCuda.streams);
  free(benchCuda.comms);
  free(benchCuda.freeBefore);
  benchCuda = (benchCuda_t){0};
}
