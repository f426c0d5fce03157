/* The measuring part of ultraep_links. One thread drives all GPUs: a copy or a pair of copies at a time. */
#include "cuda_call.h"
#include "links.h"
#include "links_kernels.h"

#include <stdio.h>
#include <stdlib.h>

/* What is kept on one GPU. */
typedef struct {
  int device;
  int32_t sms;
  int32_t nStages;    /* of bulk copies; 0: it has none */
  uint8_t *from, *to; /* [bytes] */
  unsigned long long *nWrong;
  uint64_t *flag;
  linksFlagResult_t *result;
  cudaStream_t stream;
  cudaEvent_t *events; /* [rounds + 1] */
} linksDevice_t;

typedef struct {
  const linksOptions_t *options;
  linksDevice_t *devices;
  double *seconds; /* [rounds] */
} links_t;

/* ---- the GPUs ---- */

static void links_gpu_describe(const struct cudaDeviceProp *properties, linksGpu_t *gpu) {
  const unsigned char *u = (const unsigned char *)properties->uuid.bytes;
  snprintf(gpu->name, sizeof(gpu->name), "%.63s", properties->name);
  snprintf(gpu->uuid, sizeof(gpu->uuid),
           "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", u[0], u[1], u[2], u[3],
           u[4], u[5], u[6], u[7], u[8], u[9], u[10], u[11], u[12], u[13], u[14], u[15]);
  gpu->sms = properties->multiProcessorCount;
  gpu->major = properties->major;
  gpu->minor = properties->minor;
}

int linksFind(const linksOptions_t *options, linksFigures_t *figures, perfError_t *error) {
  int count = 0;
  cudaError_t found = cudaGetDeviceCount(&count);
  if (found != cudaSuccess || count == 0)
    return perfErrorSet(error, "no CUDA device can be used: %s",
                        found == cudaSuccess ? "there is none" : cudaGetErrorString(found));
  if (options->nGpus > count)
    return perfErrorSet(error, "--gpus: %d are wanted, %d are there", options->nGpus, count);
  if (options->nGpus > 0) count = options->nGpus;
  figures->nGpus = count < LINKS_MAX_GPUS ? count : LINKS_MAX_GPUS;
  for (int i = 0; i < figures->nGpus; i++) {
    struct cudaDeviceProp properties;
    PERF_CUDA(error, cudaGetDeviceProperties(&properties, i));
    links_gpu_describe(&properties, &figures->gpus[i]);
  }
  PERF_CUDA(error, cudaDriverGetVersion(&figures->driver));
  PERF_CUDA(error, cudaRuntimeGetVersion(&figures->runtime));
  return 0;
}

static int links_device_open(linksDevice_t *device, const linksOptions_t *options, perfError_t *error) {
  size_t bytes = (size_t)options->bytes;
  device->events = calloc((size_t)options->rounds + 1, sizeof(device->events[0]));
  if (device->events == NULL) return perfErrorSet(error, "no memory for %d events", options->rounds);
  PERF_CUDA(error, cudaSetDevice(device->device));
  PERF_CUDA(error, cudaStreamCreateWithFlags(&device->stream, cudaStreamNonBlocking));
  PERF_CUDA(error, cudaMalloc((void **)&device->from, bytes));
  PERF_CUDA(error, cudaMalloc((void **)&device->to, bytes));
  PERF_CUDA(error, cudaMalloc((void **)&device->nWrong, sizeof(*device->nWrong)));
  PERF_CUDA(error, cudaMalloc((void **)&device->flag, sizeof(*device->flag)));
  PERF_CUDA(error, cudaMalloc((void **)&device->result, sizeof(*device->result)));
  for (int32_t i = 0; i <= options->rounds; i++) PERF_CUDA(error, cudaEventCreate(&device->events[i]));
  PERF_CUDA(error, linksKernelsLoad(&device->nStages));
  PERF_CUDA(error,
            linksKernelFill(device->from, options->bytes, device->device, device->sms, device->stream));
  PERF_CUDA(error, cudaStreamSynchronize(device->stream));
  return 0;
}

/* Kernels of each of the two may use the other's memory from now on; false where the machine has no way. */
static int links_reach(links_t *links, int32_t from, int32_t to, bool *reachable, perfError_t *error) {
  const linksDevice_t *sides[2] = {&links->devices[from], &links->devices[to]};
  *reachable = true;
  for (int i = 0; from != to && i < 2; i++) {
    int can = 0;
    PERF_CUDA(error, cudaDeviceCanAccessPeer(&can, sides[i]->device, sides[1 - i]->device));
    *reachable = *reachable && can != 0;
  }
  for (int i = 0; from != to && *reachable && i < 2; i++) {
    PERF_CUDA(error, cudaSetDevice(sides[i]->device));
    cudaError_t enabled = cudaDeviceEnablePeerAccess(sides[1 - i]->device, 0);
    if (enabled == cudaErrorPeerAccessAlreadyEnabled) {
      (void)cudaGetLastError();
      enabled = cudaSuccess;
    }
    PERF_CUDA(error, enabled);
  }
  return 0;
}

/* ---- copies ---- */

typedef struct {
  const linksDevice_t *runs; /* whose stream, events and SMs */
  const linksDevice_t *from, *to;
  int32_t blocks; /* of a kernel; 0: the copy engines */
  bool isBulk;
  int32_t rounds;
} linksCopy_t;

static cudaError_t links_copy_enqueue(const linksCopy_t *copy, int64_t bytes) {
  cudaStream_t stream = copy->runs->stream;
  uint8_t *to = copy->to->to, *from = copy->from->from;
  if (copy->isBulk) return linksKernelCopyBulk(to, from, bytes, copy->blocks, copy->runs->nStages, stream);
  if (copy->blocks > 0) return linksKernelCopy(to, from, bytes, copy->blocks, stream);
  if (copy->from == copy->to)
    return cudaMemcpyAsync(to, from, (size_t)bytes, cudaMemcpyDeviceToDevice, stream);
  return cudaMemcpyPeerAsync(to, copy->to->device, from, copy->from->device, (size_t)bytes, stream);
}

/* So that nothing is left of an earlier copy. */
static int links_copy_clear(const links_t *links, const linksCopy_t *copy, perfError_t *error) {
  PERF_CUDA(error, cudaSetDevice(copy->to->device));
  PERF_CUDA(error, cudaMemsetAsync(copy->to->to, 0, (size_t)links->options->bytes, copy->to->stream));
  PERF_CUDA(error, cudaStreamSynchronize(copy->to->stream));
  return 0;
}

/* An untimed copy, then the timed ones. */
static int links_copies_enqueue(const links_t *links, const linksCopy_t *copy, perfError_t *error) {
  PERF_CUDA(error, cudaSetDevice(copy->runs->device));
  for (int32_t i = 0; i <= copy->rounds; i++) {
    PERF_CUDA(error, links_copy_enqueue(copy, links->options->bytes));
    PERF_CUDA(error, cudaEventRecord(copy->runs->events[i], copy->runs->stream));
  }
  return 0;
}

static int links_copies_read(const links_t *links, const linksCopy_t *copy, double *rate,
                             perfError_t *error) {
  double moved = (copy->from == copy->to ? 2.0 : 1.0) * (double)links->options->bytes;
  float ms = 0;
  PERF_CUDA(error, cudaStreamSynchronize(copy->runs->stream));
  for (int32_t i = 0; i < copy->rounds; i++) {
    PERF_CUDA(error, cudaEventElapsedTime(&ms, copy->runs->events[i], copy->runs->events[i + 1]));
    links->seconds[i] = ms / 1e3;
  }
  double median = perfMedian(links->seconds, copy->rounds);
  *rate = median > 0 ? moved / median : 0;
  return 0;
}

/* All that arrived, on the GPU where it did. */
static int links_copy_check(const links_t *links, const linksCopy_t *copy, perfError_t *error) {
  const linksDevice_t *to = copy->to;
  int64_t bytes = links->options->bytes;
  unsigned long long nWrong = 0;
  char kind[64] = "the copy engines";
  PERF_CUDA(error, cudaSetDevice(to->device));
  PERF_CUDA(error, cudaMemsetAsync(to->nWrong, 0, sizeof(*to->nWrong), to->stream));
  PERF_CUDA(error, linksKernelCheck(to->to, bytes, copy->from->device, to->sms, to->nWrong, to->stream));
  PERF_CUDA(error, cudaStreamSynchronize(to->stream));
  PERF_CUDA(error, cudaMemcpy(&nWrong, to->nWrong, sizeof(nWrong), cudaMemcpyDeviceToHost));
  if (nWrong == 0) return 0;
  if (copy->blocks > 0)
    snprintf(kind, sizeof(kind), "%s %s of %d blocks", copy->isBulk ? "bulk" : "plain",
             copy->runs == copy->from ? "stores" : "loads", copy->blocks);
  return perfErrorSet(error, "copy from GPU %d to %d by %s: of %lld bytes %llu differ from the source",
                      copy->from->device, to->device, kind, (long long)bytes, 16 * nWrong);
}

/* One copy, or two at once, which then lie side by side but for the first and the last. */
static int links_copies_time(const links_t *links, const linksCopy_t *copies, int n, double *const rates[],
                             perfError_t *error) {
  for (int i = 0; i < n; i++)
    if (links_copy_clear(links, &copies[i], error) != 0) return -1;
  for (int i = 0; i < n; i++)
    if (links_copies_enqueue(links, &copies[i], error) != 0) return -1;
  for (int i = 0; i < n; i++)
    if (links_copies_read(links, &copies[i], rates[i], error) != 0) return -1;
  for (int i = 0; i < n; i++)
    if (links_copy_check(links, &copies[i], error) != 0) return -1;
  return 0;
}

static int links_engines_time(const links_t *links, linksFigures_t *figures, int32_t from, int32_t to,
                              perfError_t *error) {
  const linksDevice_t *a = &links->devices[from], *b = &links->devices[to];
  linksPair_t *there = &figures->pairs[from][to], *back = &figures->pairs[to][from];
  const linksCopy_t copies[2] = {{.runs = a, .from = a, .to = b, .rounds = links->options->rounds},
                                 {.runs = b, .from = b, .to = a, .rounds = links->options->rounds}};
  if (links_copies_time(links, copies, 1, (double *[]){&there->copy}, error) != 0) return -1;
  if (from >= to) return 0;
  return links_copies_time(links, copies, 2, (double *[]){&there->both, &back->both}, error);
}

/* By kernels of budgets[budget] blocks: one direction, then both at once. */
static int links_kernels_time(const links_t *links, linksFigures_t *figures, int32_t from, int32_t to,
                              linksWay_t way, int32_t budget, perfError_t *error) {
  const linksDevice_t *a = &links->devices[from], *b = &links->devices[to];
  linksPair_t *there = &figures->pairs[from][to], *back = &figures->pairs[to][from];
  const bool isBulk = way == LINKS_STORE_BULK || way == LINKS_LOAD_BULK;
  const bool isLoad = way == LINKS_LOAD || way == LINKS_LOAD_BULK;
  const linksCopy_t copy = {.runs = isLoad ? b : a,
                            .from = a,
                            .to = b,
                            .blocks = links->options->budgets[budget],
                            .isBulk = isBulk,
                            .rounds = linksKernelRounds(links->options, figures->nGpus)};
  linksCopy_t copies[2] = {copy, copy};
  copies[1].runs = isLoad ? a : b;
  copies[1].from = b;
  copies[1].to = a;
  if (isLoad && from == to) return 0;
  if (isBulk && copies[0].runs->nStages == 0) return 0;
  if (links_copies_time(links, copies, 1, (double *[]){&there->kernel[way][budget]}, error) != 0) return -1;
  if (from >= to || !linksKernelBoth(figures->nGpus, from, to)) return 0;
  if (isBulk && copies[1].runs->nStages == 0) return 0;
  return links_copies_time(
      links, copies, 2, (double *[]){&there->kernelBoth[way][budget], &back->kernelBoth[way][budget]}, error);
}

/* ---- flags ---- */

static int links_flags_time(const links_t *links, linksFigures_t *figures, int32_t from, int32_t to,
                            perfError_t *error) {
  const linksDevice_t *sides[2] = {&links->devices[from], &links->devices[to]};
  linksFlagResult_t results[2];
  for (int i = 0; i < 2; i++) {
    PERF_CUDA(error, cudaSetDevice(sides[i]->device));
    PERF_CUDA(error, cudaMemsetAsync(sides[i]->flag, 0, sizeof(*sides[i]->flag), sides[i]->stream));
    PERF_CUDA(error, cudaMemsetAsync(sides[i]->result, 0, sizeof(*sides[i]->result), sides[i]->stream));
    PERF_CUDA(error, cudaStreamSynchronize(sides[i]->stream));
  }
  for (int i = 0; i < 2; i++) {
    PERF_CUDA(error, cudaSetDevice(sides[i]->device));
    PERF_CUDA(error, linksKernelFlags(sides[i]->flag, sides[1 - i]->flag, links->options->trips, i == 0,
                                      sides[i]->result, sides[i]->stream));
  }
  for (int i = 0; i < 2; i++) {
    PERF_CUDA(error, cudaStreamSynchronize(sides[i]->stream));
    PERF_CUDA(error, cudaMemcpy(&results[i], sides[i]->result, sizeof(results[i]), cudaMemcpyDeviceToHost));
  }
  if (results[0].failed || results[1].failed)
    return perfErrorSet(error, "flags between GPUs %d and %d: no answer within %d s", from, to,
                        LINKS_WAIT_SECONDS);
  for (int i = 0; i < 2; i++) {
    linksPair_t *pair = i == 0 ? &figures->pairs[from][to] : &figures->pairs[to][from];
    pair->flagUs = (double)results[i].ns / 1e3 / links->options->trips;
  }
  return 0;
}

/* ---- all pairs ---- */

static int links_pair_measure(links_t *links, linksFigures_t *figures, int32_t from, int32_t to,
                              perfError_t *error) {
  bool *isReachable = &figures->pairs[from][to].reachable;
  if (links_reach(links, from, to, isReachable, error) != 0) return -1;
  if (links_engines_time(links, figures, from, to, error) != 0) return -1;
  if (!*isReachable) return 0;
  for (int32_t budget = 0; budget < links->options->nBudgets; budget++) {
    for (linksWay_t way = 0; way < LINKS_WAYS; way++)
      if (links_kernels_time(links, figures, from, to, way, budget, error) != 0) return -1;
  }
  return from < to ? links_flags_time(links, figures, from, to, error) : 0;
}

static int links_all_measure(links_t *links, linksFigures_t *figures, perfError_t *error) {
  for (int32_t i = 0; i < figures->nGpus; i++) {
    links->devices[i].device = i;
    links->devices[i].sms = figures->gpus[i].sms;
    if (links_device_open(&links->devices[i], links->options, error) != 0) return -1;
  }
  for (int32_t from = 0; from < figures->nGpus; from++) {
    for (int32_t to = 0; to < figures->nGpus; to++)
      if (links_pair_measure(links, figures, from, to, error) != 0) return -1;
  }
  return 0;
}

/* GPU memory, streams and events go with the process, which ends soon. */
int linksMeasure(const linksOptions_t *options, linksFigures_t *figures, perfError_t *error) {
  links_t links = {.options = options};
  links.devices = calloc((size_t)figures->nGpus, sizeof(links.devices[0]));
  links.seconds = calloc((size_t)options->rounds, sizeof(links.seconds[0]));
  int status = links.devices != NULL && links.seconds != NULL
                   ? links_all_measure(&links, figures, error)
                   : perfErrorSet(error, "no memory for %d GPUs", figures->nGpus);
  for (int32_t i = 0; links.devices != NULL && i < figures->nGpus; i++) free(links.devices[i].events);
  free(links.seconds);
  free(links.devices);
  return status;
}
