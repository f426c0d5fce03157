/* The NCCL backend gives what the host backend gives, bit for bit: routes, rows, weights, scales and combined
 * tokens, on random shapes, with poisoned outputs. */
#include "gpu_world.h"
#include "planner_common.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "gpu_common.h"

#define POISON 0xa5

typedef struct {
  uint64_t seed;
  ultraepConfig_t config;
  int nTokens[GPU_WORLD_MAX_RANKS];
  bool weighted, oneExpert, unused;
  int nUpdates;
} shape_t;

/* One rank's data: inputs on the host, and outputs of both backends. */
typedef struct {
  size_t rowBytes, nRows, nTokens, topK;
  int32_t *topk;
  float *weights;
  unsigned char *tokens, *scales;
  unsigned char *rows[2], *rowScales[2], *rowWeights[2], *out[2]; /* [0] host, [1] device, copied back */
} rank_t;

static shape_t shape_make(planner_random_t *random, int nRanks, int number) {
  static const int hiddens[] = {16, 64, 208, 1024, 4096, 7168, 8192};
  static const int perRank[] = {1, 2, 3, 8, 32, 128};
  shape_t x = {.seed = planner_random_next(random), .config = ULTRAEP_CONFIG_INITIALIZER};
  ultraepConfig_t *c = &x.config;
  c->nExperts = nRanks * perRank[planner_random_below(random, 6)];
  c->topK = 1 + planner_random_below(random, 16);
  c->hidden = hiddens[planner_random_below(random, 7)];
  c->dataType = planner_random_below(random, 5);
  c->nSlots = planner_random_below(random, 5);
  c->alignment = planner_random_below(random, 2) ? 1 : 1 << planner_random_below(random, 8);
  c->scaleBytes = planner_random_below(random, 3) ? 0 : 4 * (1 + planner_random_below(random, 56));
  c->maxTokens = number % 10 == 0 ? 4096 : 1 + planner_random_below(random, 600);
  if (c->maxTokens == 4096 && c->hidden > 208) c->hidden = 208; /* capacity is the worst case: gigabytes */
  c->dispatchMode = planner_random_below(random, 3);
  c->combineMode = planner_random_below(random, 4) == 0;
  c->tolerance = planner_random_below(random, 3) ? 0 : 0.02;
  c->maxCtas = 1 + planner_random_below(random, 16);
  c->balance = planner_random_below(random, 5) != 0;
  c->maxRecvRows = (int64_t)nRanks * c->maxTokens * c->topK + (int64_t)(c->nExperts + 4) * c->alignment;
  c->timeoutMs = 20000;
  for (int r = 0; r < nRanks; r++) {
    int kind = planner_random_below(random, 4);
    x.nTokens[r] = kind == 0 ? 0 : kind == 1 ? c->maxTokens : planner_random_below(random, c->maxTokens + 1);
  }
  x.weighted = planner_random_below(random, 3) != 0;
  x.oneExpert = planner_random_below(random, 8) == 0;
  x.unused = planner_random_below(random, 2);
  x.nUpdates = 1 + planner_random_below(random, 2);
  return x;
}

static bool adds(int32_t type) {
  return type <= ULTRAEP_FLOAT32;
}

static size_t type_bytes(int32_t type) {
  return type == ULTRAEP_FLOAT32 ? 4 : type <= ULTRAEP_FLOAT16 ? 2 : 1;
}

static void fill_inputs(const shape_t *x, rank_t *data, planner_random_t *random) {
  size_t elements = data->nTokens * (size_t)x->config.hidden;
  for (size_t i = 0; i < data->nTokens * data->topK; i++) {
    int32_t hot = planner_random_below(random, 4) ? 0 : planner_random_below(random, x->config.nExperts);
    data->topk[i] = x->oneExpert                      ? x->config.nExperts - 1
                    : planner_random_below(random, 2) ? hot
                                                      : planner_random_below(random, x->config.nExperts);
    if (x->unused && planner_random_below(random, 9) == 0) data->topk[i] = -1;
    data->weights[i] = (float)planner_random_below(random, 1 << 20) / (float)(1 << 20);
  }
  for (size_t i = 0; i < elements; i++) {
    float value = (float)planner_random_below(random, 1 << 16) / 8192.0f - 4.0f;
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    uint16_t bf16 = (uint16_t)(bits >> 16), f16 = (uint16_t)(0x3000 + (bits >> 20 & 0xfff) % 0x1800);
    if (x->config.dataType == ULTRAEP_FLOAT32)
      memcpy(data->tokens + 4 * i, &value, 4);
    else if (x->config.dataType == ULTRAEP_BFLOAT16)
      memcpy(data->tokens + 2 * i, &bf16, 2);
    else if (x->config.dataType == ULTRAEP_FLOAT16)
      memcpy(data->tokens + 2 * i, &f16, 2);
    else
      data->tokens[i] = (unsigned char)bits;
  }
  for (size_t i = 0; i < data->nTokens * (size_t)x->config.scaleBytes; i++)
    data->scales[i] = (unsigned char)planner_random_next(random);
}

static const char *rank_make(const shape_t *x, int rank, int64_t nRows, rank_t *data) {
  const ultraepConfig_t *c = &x->config;
  *data = (rank_t){.rowBytes = (size_t)c->hidden * type_bytes(c->dataType),
                   .nRows = (size_t)nRows,
                   .nTokens = (size_t)x->nTokens[rank],
                   .topK = (size_t)c->topK};
  size_t n = data->nTokens + 1;
  data->topk = malloc(n * data->topK * sizeof(int32_t));
  data->weights = malloc(n * data->topK * sizeof(float));
  data->tokens = malloc(n * data->rowBytes);
  data->scales = malloc(n * (size_t)c->scaleBytes + 1);
  for (int b = 0; b < 2; b++) {
    data->out[b] = malloc(n * data->rowBytes);
    RANK_CHECK(data->out[b], "no memory");
    memset(data->out[b], POISON, n * data->rowBytes);
  }
  data->rows[1] = malloc(data->nRows * data->rowBytes);
  data->rowScales[1] = malloc(data->nRows * (size_t)c->scaleBytes + 1);
  data->rowWeights[1] = malloc(data->nRows * sizeof(float));
  RANK_CHECK(data->topk && data->weights && data->tokens && data->scales && data->rows[1] &&
                 data->rowScales[1] && data->rowWeights[1],
             "no memory");
  return NULL;
}

static void rank_free(rank_t *data) {
  free(data->topk);
  free(data->weights);
  free(data->tokens);
  free(data->scales);
  free(data->out[0]);
  free(data->out[1]);
  free(data->rows[1]);
  free(data->rowScales[1]);
  free(data->rowWeights[1]);
}

/* Symmetric buffers of one group: rows, scales, weights. */
typedef struct {
  unsigned char *rows, *scales, *weights;
} buffers_t;

static const char *buffers_make(ultraepGroup_t group, const rank_t *data, const ultraepConfig_t *c,
                                buffers_t *made) {
  RANK_OK(ultraepMemAlloc(group, (void **)&made->rows, data->nRows * data->rowBytes));
  RANK_OK(ultraepMemAlloc(group, (void **)&made->scales, data->nRows * (size_t)c->scaleBytes + 16));
  RANK_OK(ultraepMemAlloc(group, (void **)&made->weights, data->nRows * sizeof(float)));
  return NULL;
}

static ultraepTensors_t dispatch_tensors(const ultraepConfig_t *c, const buffers_t *b, const void *tokens,
                                         const void *scales) {
  ultraepTensors_t t = ULTRAEP_TENSORS_INITIALIZER;
  t.sendbuff = tokens;
  t.recvbuff = b->rows;
  t.sendScales = c->scaleBytes ? scales : NULL;
  t.recvScales = c->scaleBytes ? b->scales : NULL;
  t.recvWeights = (float *)b->weights;
  return t;
}

static ultraepTensors_t combine_tensors(const buffers_t *b, void *out) {
  ultraepTensors_t t = ULTRAEP_TENSORS_INITIALIZER;
  t.sendbuff = b->rows;
  t.recvbuff = out;
  return t;
}

static const char *host_run(const shape_t *x, rank_t *data, ultraepRoute_t route, buffers_t *b) {
  const ultraepConfig_t *c = &x->config;
  memset(b->rows, POISON, data->nRows * data->rowBytes);
  memset(b->scales, POISON, data->nRows * (size_t)c->scaleBytes);
  memset(b->weights, POISON, data->nRows * sizeof(float));
  RANK_OK(
      ultraepRouteUpdate(route, data->topk, x->weighted ? data->weights : NULL, (int)data->nTokens, NULL));
  ultraepTensors_t t = dispatch_tensors(c, b, data->tokens, data->scales);
  RANK_OK(ultraepAllToAllTensors(&t, ULTRAEP_DISPATCH, route, NULL));
  t = combine_tensors(b, data->out[0]);
  if (adds(c->dataType))
    RANK_OK(ultraepAllToAllTensors(&t, x->weighted ? ULTRAEP_COMBINE : ULTRAEP_COMBINE_SUM, route, NULL));
  data->rows[0] = b->rows;
  data->rowScales[0] = b->scales;
  data->rowWeights[0] = b->weights;
  return NULL;
}

/* Device copies of a rank's inputs. */
typedef struct {
  int32_t *topk;
  float *weights;
  unsigned char *tokens, *scales, *out;
} inputs_t;

static const char *inputs_make(const shape_t *x, const rank_t *data, inputs_t *d) {
  size_t n = data->nTokens + 1, entries = n * data->topK;
  RANK_CUDA(cudaMalloc((void **)&d->topk, entries * sizeof(int32_t)));
  RANK_CUDA(cudaMalloc((void **)&d->weights, entries * sizeof(float)));
  RANK_CUDA(cudaMalloc((void **)&d->tokens, n * data->rowBytes));
  RANK_CUDA(cudaMalloc((void **)&d->scales, n * (size_t)x->config.scaleBytes + 16));
  RANK_CUDA(cudaMalloc((void **)&d->out, n * data->rowBytes));
  return NULL;
}

static void inputs_free(inputs_t *d) {
  (void)cudaFree(d->topk);
  (void)cudaFree(d->weights);
  (void)cudaFree(d->tokens);
  (void)cudaFree(d->scales);
  (void)cudaFree(d->out);
}

static const char *device_run(const shape_t *x, rank_t *data, ultraepRoute_t route, buffers_t *b, inputs_t *d,
                              cudaStream_t stream) {
  const ultraepConfig_t *c = &x->config;
  size_t entries = data->nTokens * data->topK, scaleBytes = (size_t)c->scaleBytes;
  RANK_CUDA(cudaMemcpyAsync(d->topk, data->topk, entries * sizeof(int32_t), cudaMemcpyHostToDevice, stream));
  RANK_CUDA(
      cudaMemcpyAsync(d->weights, data->weights, entries * sizeof(float), cudaMemcpyHostToDevice, stream));
  RANK_CUDA(cudaMemcpyAsync(d->tokens, data->tokens, data->nTokens * data->rowBytes, cudaMemcpyHostToDevice,
                            stream));
  RANK_CUDA(
      cudaMemcpyAsync(d->scales, data->scales, data->nTokens * scaleBytes, cudaMemcpyHostToDevice, stream));
  RANK_CUDA(cudaMemsetAsync(d->out, POISON, (data->nTokens + 1) * data->rowBytes, stream));
  RANK_CUDA(cudaMemsetAsync(b->rows, POISON, data->nRows * data->rowBytes, stream));
  RANK_CUDA(cudaMemsetAsync(b->scales, POISON, data->nRows * scaleBytes, stream));
  RANK_CUDA(cudaMemsetAsync(b->weights, POISON, data->nRows * sizeof(float), stream));
  RANK_OK(ultraepRouteUpdate(route, d->topk, x->weighted ? d->weights : NULL, (int)data->nTokens, stream));
  ultraepTensors_t t = dispatch_tensors(c, b, d->tokens, d->scales);
  RANK_OK(ultraepAllToAllTensors(&t, ULTRAEP_DISPATCH, route, stream));
  t = combine_tensors(b, d->out);
  if (adds(c->dataType))
    RANK_OK(ultraepAllToAllTensors(&t, x->weighted ? ULTRAEP_COMBINE : ULTRAEP_COMBINE_SUM, route, stream));
  RANK_CUDA(
      cudaMemcpyAsync(data->rows[1], b->rows, data->nRows * data->rowBytes, cudaMemcpyDeviceToHost, stream));
  RANK_CUDA(cudaMemcpyAsync(data->rowScales[1], b->scales, data->nRows * scaleBytes, cudaMemcpyDeviceToHost,
                            stream));
  RANK_CUDA(cudaMemcpyAsync(data->rowWeights[1], b->weights, data->nRows * sizeof(float),
                            cudaMemcpyDeviceToHost, stream));
  RANK_CUDA(cudaMemcpyAsync(data->out[1], d->out, (data->nTokens + 1) * data->rowBytes,
                            cudaMemcpyDeviceToHost, stream));
  RANK_CUDA(cudaStreamSynchronize(stream));
  return NULL;
}

static const char *compare_segments(ultraepRoute_t host, ultraepRoute_t device) {
  ultraepSegments_t a, b;
  RANK_OK(ultraepRouteSegments(host, &a));
  RANK_OK(ultraepRouteSegments(device, &b));
  RANK_CHECK(a.nSegments == b.nSegments, "segments: %d, host %d", b.nSegments, a.nSegments);
  for (int i = 0; i < a.nSegments; i++) {
    int32_t expert;
    int64_t first, rows;
    RANK_CUDA(cudaMemcpy(&expert, b.expert + i, sizeof(expert), cudaMemcpyDeviceToHost));
    RANK_CUDA(cudaMemcpy(&first, b.firstRow + i, sizeof(first), cudaMemcpyDeviceToHost));
    RANK_CUDA(cudaMemcpy(&rows, b.rows + i, sizeof(rows), cudaMemcpyDeviceToHost));
    RANK_CHECK(expert == a.expert[i] && first == a.firstRow[i] && rows == a.rows[i],
               "segment %d: expert %d first %lld rows %lld, host %d %lld %lld", i, expert, (long long)first,
               (long long)rows, a.expert[i], (long long)a.firstRow[i], (long long)a.rows[i]);
  }
  int64_t total;
  RANK_CUDA(cudaMemcpy(&total, b.totalRows, sizeof(total), cudaMemcpyDeviceToHost));
  RANK_CHECK(total == *a.totalRows, "totalRows %lld, host %lld", (long long)total, (long long)*a.totalRows);
  return NULL;
}

static const char *compare_bytes(const char *what, const unsigned char *host, const unsigned char *device,
                                 size_t n, size_t rowBytes) {
  if (memcmp(host, device, n) == 0) return NULL;
  size_t i = 0;
  while (host[i] == device[i]) i++;
  return gpu_world_say("%s: row %zu byte %zu is 0x%02x, host 0x%02x", what, i / rowBytes, i % rowBytes,
                       device[i], host[i]);
}

static const char *compare(const shape_t *x, const rank_t *data, ultraepRoute_t host, ultraepRoute_t device) {
  const char *flaw = compare_segments(host, device);
  size_t scaleBytes = (size_t)x->config.scaleBytes;
  if (!flaw)
    flaw = compare_bytes("rows", data->rows[0], data->rows[1], data->nRows * data->rowBytes, data->rowBytes);
  if (!flaw && scaleBytes)
    flaw =
        compare_bytes("scales", data->rowScales[0], data->rowScales[1], data->nRows * scaleBytes, scaleBytes);
  if (!flaw)
    flaw = compare_bytes("weights", data->rowWeights[0], data->rowWeights[1], data->nRows * sizeof(float),
                         sizeof(float));
  if (!flaw)
    flaw = compare_bytes("tokens", data->out[0], data->out[1], (data->nTokens + 1) * data->rowBytes,
                         data->rowBytes);
  return flaw;
}

static const char *compare_counters(ultraepGroup_t host, ultraepGroup_t device) {
  ultraepCounters_t a, b;
  RANK_OK(ultraepGroupCounters(host, &a));
  RANK_OK(ultraepGroupCounters(device, &b));
  RANK_CHECK(a.dispatchBytes == b.dispatchBytes, "dispatch crossed %lld bytes, host %lld",
             (long long)b.dispatchBytes, (long long)a.dispatchBytes);
  RANK_CHECK(a.combineBytes == b.combineBytes, "combine crossed %lld bytes, host %lld",
             (long long)b.combineBytes, (long long)a.combineBytes);
  return NULL;
}

static const char *shape_rank(gpuWorld_t *world, int rank, void *argument) {
  const shape_t *x = argument;
  ultraepGroup_t groups[2];
  ultraepRoute_t routes[2];
  ultraepGroupProperties_t properties;
  rank_t data;
  buffers_t buffers[2];
  inputs_t inputs;
  RANK_OK(ultraepGroupCreateHost(&groups[0], world->host, rank, &x->config));
  RANK_OK(ultraepGroupCreate(&groups[1], world->comms[rank], &x->config));
  RANK_OK(ultraepGroupProperties(groups[1], &properties));
  const char *flaw = rank_make(x, rank, properties.maxRecvRows, &data);
  if (!flaw) flaw = inputs_make(x, &data, &inputs);
  for (int b = 0; b < 2 && !flaw; b++) {
    RANK_OK(ultraepRouteCreate(groups[b], &routes[b]));
    flaw = buffers_make(groups[b], &data, &x->config, &buffers[b]);
  }
  planner_random_t random = {x->seed + (uint64_t)rank};
  for (int i = 0; i < x->nUpdates && !flaw; i++) {
    fill_inputs(x, &data, &random);
    flaw = host_run(x, &data, routes[0], &buffers[0]);
    if (!flaw) flaw = device_run(x, &data, routes[1], &buffers[1], &inputs, world->streams[rank]);
    if (!flaw) flaw = compare(x, &data, routes[0], routes[1]);
  }
  if (!flaw) flaw = compare_counters(groups[0], groups[1]);
  inputs_free(&inputs);
  rank_free(&data);
  RANK_OK(ultraepGroupDestroy(groups[1]));
  RANK_OK(ultraepGroupDestroy(groups[0]));
  return flaw;
}

static int nShapes = 100; /* for each number of ranks */

static void check_ranks(int nRanks) {
  gpuWorld_t world;
  planner_random_t random = {(uint64_t)nRanks * 1000};
  const char *flaw = gpu_world_make(&world, nRanks);
  if (flaw) fail_msg("%s", flaw);
  for (int i = 0; i < nShapes; i++) {
    shape_t x = shape_make(&random, nRanks, i);
    flaw = gpu_world_run(&world, shape_rank, &x);
    if (flaw)
      fail_msg("shape %d (R %d E %d K %d S %d hidden %d type %d tokens %d alignment %d scales %d dispatch %d "
               "combine %d "
               "blocks %d balance %d): %s",
               i, nRanks, x.config.nExperts, x.config.topK, x.config.nSlots, x.config.hidden,
               x.config.dataType, x.config.maxTokens, x.config.alignment, x.config.scaleBytes,
               x.config.dispatchMode, x.config.combineMode, x.config.maxCtas, x.config.balance, flaw);
  }
  gpu_world_free(&world);
  print_message("%d shapes on %d ranks\n", nShapes, nRanks);
}

static void test_two(void **state) {
  (void)state;
  check_ranks(2);
}
static void test_four(void **state) {
  (void)state;
  check_ranks(4);
}
static void test_eight(void **state) {
  (void)state;
  check_ranks(8);
}

/* Optional argument: shapes for each number of ranks (fewer under a checker). */
int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_two), cmocka_unit_test(test_four),
                                     cmocka_unit_test(test_eight)};
  GPU_REQUIRE();
  if (!gpu_world_usable()) return GPU_SKIP_CODE;
  if (argc > 1) nShapes = atoi(argv[1]);
  return cmocka_run_group_tests_name("gpu_exchange", tests, NULL, NULL);
}
