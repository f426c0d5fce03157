/* libFuzzer: arbitrary bytes as configs, tensors, experts, planner configs and loads through the pure checks
 * and the planner, and as whole programs of API calls that the rank threads of a host world carry out. What
 * must hold: no crash, no leak, no undefined behaviour; a failure has one of the documented codes and a
 * message; what a check lets through can be worked with; a plan keeps every promise. */
#include "config.h"
#include "planner_common.h"

#include <math.h>
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_RANKS 3
#define MAX_TIMEOUT_MS 20
#define N_HANDLES 4
#define MAX_OPERATIONS 64
#define OWN_BYTES ((size_t)1 << 16) /* memory of a rank's own, for registering and for gradients */
#define GRAD_BYTES (OWN_BYTES / ULTRAEP_MAX_TENSORS)
#define MAX_GROUP_BYTES (INT64_C(4) << 20)
#define MAX_LOADS (1 << 14)
#define SPARE 64 /* bytes behind a buffer, so that it may also be passed with an offset */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define REQUIRE(condition) ((condition) ? (void)0 : fuzz_fail(__LINE__, #condition))
static void fuzz_fail(int line, const char *what) {
  fprintf(stderr, "fuzz_config.c:%d: not so: %s (last error: %s)\n", line, what, ultraepGetLastError());
  abort();
}

/* A result is documented and, where it is a failure, has a message. */
static bool fuzz_good(ultraepResult_t result) {
  if (result == ultraepSuccess) return true;
  REQUIRE(result == ultraepSystemError || result == ultraepInvalidArgument || result == ultraepInvalidUsage ||
          result == ultraepRemoteError || result == ultraepTimeout || result == ultraepCapacityExceeded);
  REQUIRE(ultraepGetLastError()[0] != '\0');
  return false;
}

/* ---- decoding: zeros once the bytes are used up ---- */

typedef struct {
  const uint8_t *next;
  size_t left;
} fuzzBytes_t;

static uint64_t fuzz_number(fuzzBytes_t *bytes, int nBytes) {
  uint64_t number = 0;
  for (int i = 0; i < nBytes && bytes->left > 0; i++, bytes->left--)
    number |= (uint64_t)*bytes->next++ << (8 * i);
  return number;
}

static int fuzz_below(fuzzBytes_t *bytes, int n) {
  return (int)(fuzz_number(bytes, n > 256 ? 4 : 1) % (uint64_t)n);
}

/* A number that is likely to be near a limit. */
static uint64_t fuzz_limit(fuzzBytes_t *bytes) {
  static const double reals[] = {-1.0, 0.5, 1000.0, 1e18, 1e300, 1e-300, (double)INFINITY, (double)NAN};
  uint64_t number;
  switch (fuzz_below(bytes, 5)) {
  case 0:
    return fuzz_number(bytes, 1);
  case 1:
    return UINT64_MAX - fuzz_number(bytes, 1);
  case 2:
    number = UINT64_C(1) << fuzz_below(bytes, 64);
    return number + fuzz_number(bytes, 1) - 1;
  case 3:
    memcpy(&number, &reals[fuzz_below(bytes, 8)], sizeof(number));
    return number;
  default:
    return fuzz_number(bytes, 8);
  }
}

/* Puts such numbers into some fields of a struct of 4 and 8 byte fields, or any bytes into all of it. */
static void fuzz_overwrite(fuzzBytes_t *bytes, void *object, size_t size) {
  int n = fuzz_below(bytes, 6);
  if (n == 5)
    for (size_t i = 0; i < size; i++) ((unsigned char *)object)[i] = (unsigned char)fuzz_number(bytes, 1);
  for (int i = 0; i < n && n < 5; i++) {
    size_t offset = (size_t)fuzz_below(bytes, (int)(size / 4)) * 4;
    size_t width = offset % 8 == 0 && offset + 8 <= size && fuzz_below(bytes, 2) ? 8 : 4;
    uint64_t number = fuzz_limit(bytes);
    memcpy((unsigned char *)object + offset, &number, width);
  }
}

/* A config that is good but for what is overwritten. */
static ultraepConfig_t fuzz_config(fuzzBytes_t *bytes, int nRanks) {
  ultraepConfig_t config = ULTRAEP_CONFIG_INITIALIZER;
  config.nExperts = nRanks * (1 + fuzz_below(bytes, 4));
  config.topK = 1 + fuzz_below(bytes, 4);
  config.maxTokens = 1 + fuzz_below(bytes, 12);
  config.hidden = 16 * (1 + fuzz_below(bytes, 3));
  config.dataType = fuzz_below(bytes, 5);
  config.scaleBytes = 4 * fuzz_below(bytes, 3);
  config.nSlots = fuzz_below(bytes, 4);
  config.alignment = 1 + fuzz_below(bytes, 5);
  config.maxRecvRows = fuzz_below(bytes, 3) == 2 ? 1 + fuzz_below(bytes, 64) : 0;
  config.dispatchMode = fuzz_below(bytes, 3);
  config.combineMode = fuzz_below(bytes, 2);
  config.gradsMode = fuzz_below(bytes, 4);
  config.peers = fuzz_below(bytes, 3);
  config.maxRoutes = 1 + fuzz_below(bytes, 3);
  config.replicaRows = fuzz_below(bytes, 4) ? 0 : 1 << fuzz_below(bytes, 21);
  fuzz_overwrite(bytes, &config, sizeof(config));
  return config;
}

/* ---- the pure checks ---- */

static void fuzz_checks(fuzzBytes_t *bytes) {
  int nRanks = fuzz_below(bytes, 2) ? 1 + fuzz_below(bytes, 16) : (int)(int32_t)fuzz_limit(bytes);
  ultraepConfig_t config = fuzz_config(bytes, nRanks > 0 && nRanks <= ULTRAEP_MAX_RANKS ? nRanks : 1);
  if (!fuzz_good(config_check(&config, nRanks))) return;
  REQUIRE(config_difference(&config, &config) == NULL);
  ultraepPlannerConfig_t planner =
      config_planner(&config, nRanks, config.domainRanks ? config.domainRanks : nRanks);
  REQUIRE(ultraepPlannerConfigError(&planner)[0] == '\0');
  ultraepExperts_t experts = ULTRAEP_EXPERTS_INITIALIZER;
  configRates_t measured = {.linkBytesPerSecond = ldexp(1, fuzz_below(bytes, 256) - 128),
                            .weightBytesPerSecond = ldexp(1, fuzz_below(bytes, 256) - 128)};
  experts.nWeights = 1 + fuzz_below(bytes, ULTRAEP_MAX_TENSORS);
  experts.nGrads = fuzz_below(bytes, ULTRAEP_MAX_TENSORS + 1);
  experts.weights[0].bytes = experts.grads[0].bytes = (size_t)1 << fuzz_below(bytes, 41);
  config_gate(&config, &measured, &experts, &planner);
  REQUIRE(ultraepPlannerConfigError(&planner)[0] == '\0');
  REQUIRE((planner.copyPs > 0) == (config.expertBytes != 0));
  int64_t maxRecvRows = config_recv_rows(&config, nRanks);
  REQUIRE(maxRecvRows >= 1 && maxRecvRows <= CONFIG_MAX_RECV_ROWS);

  ultraepTensors_t tensors = ULTRAEP_TENSORS_INITIALIZER;
  tensors.sendbuff = (const void *)(uintptr_t)(fuzz_limit(bytes) & ~UINT64_C(15)); /* only looked at */
  tensors.recvbuff = (void *)(uintptr_t)(fuzz_limit(bytes) & ~UINT64_C(15));
  fuzz_overwrite(bytes, &tensors, sizeof(tensors));
  int64_t nTokens = (int64_t)(fuzz_limit(bytes) % ((uint64_t)config.maxTokens + 1));
  int32_t direction = (int32_t)fuzz_below(bytes, 4) - (fuzz_below(bytes, 8) == 0);
  fuzz_good(config_check_tensors(&config, &tensors, (ultraepDirection_t)direction, nTokens, maxRecvRows));
}

static void fuzz_experts(fuzzBytes_t *bytes) {
  ultraepExperts_t experts = ULTRAEP_EXPERTS_INITIALIZER;
  experts.nWeights = 1 + fuzz_below(bytes, ULTRAEP_MAX_TENSORS);
  experts.nGrads = fuzz_below(bytes, ULTRAEP_MAX_TENSORS + 1);
  for (int t = 0; t < ULTRAEP_MAX_TENSORS; t++) {
    experts.weights[t] = (ultraepExpertTensor_t){bytes, 16, 0, 0};
    experts.grads[t] = (ultraepExpertTensor_t){bytes, 16, ULTRAEP_FLOAT32, 0};
  }
  experts.weights[0].master = experts.grads[0].master = (void *)(uintptr_t)(fuzz_limit(bytes) << 4);
  fuzz_overwrite(bytes, &experts, sizeof(experts));
  fuzz_good(config_check_experts(fuzz_below(bytes, 64) == 63 ? NULL : &experts));
}

/* ---- the planner ---- */

static bool fuzz_loads(fuzzBytes_t *bytes, int32_t *loads, const ultraepPlannerConfig_t *config) {
  planner_random_t random = {.state = fuzz_number(bytes, 8)};
  int kind = fuzz_below(bytes, 4), shift = fuzz_below(bytes, 32);
  bool allowed = true;
  for (int32_t src = 0; src < config->nRanks; src++) {
    int64_t sum = 0;
    for (int32_t e = 0; e < config->nExperts; e++) {
      int32_t *load = &loads[(int64_t)src * config->nExperts + e];
      uint32_t skew = (uint32_t)planner_random_next(&random) & 15;
      *load = kind == 0   ? (int32_t)fuzz_number(bytes, 1)
              : kind == 1 ? (int32_t)fuzz_number(bytes, 4)
                          : (int32_t)((uint32_t)(planner_random_next(&random) >> 33) >> shift);
      if (kind == 3) *load >>= skew;
      if (*load < 0) allowed = false;
      sum += *load;
    }
    if (sum > INT32_MAX) allowed = false;
  }
  return allowed;
}

static void fuzz_cost(fuzzBytes_t *bytes, const ultraepPlannerConfig_t *config, const ultraepPlan_t *plan) {
  ultraepLink_t link = {fuzz_limit(bytes), fuzz_limit(bytes), fuzz_limit(bytes)};
  ultraepPlanCost_t cost;
  ultraepCopies_t direct, relay;
  int32_t *source = malloc(sizeof(*source) * ((size_t)plan->nReplicas + 1));
  REQUIRE(source != NULL);
  REQUIRE(ultraepPlanCost(config, plan, &cost) == ultraepSuccess);
  REQUIRE(ultraepPlanRelay(plan, source) == ultraepSuccess);
  bool good =
      link.copyPs <= ULTRAEP_MAX_COPY_PS && link.tilePs <= link.copyPs && link.hopPs <= ULTRAEP_MAX_COPY_PS;
  REQUIRE((ultraepPlanCopies(plan, NULL, &link, &direct) == ultraepSuccess) == good);
  REQUIRE((ultraepPlanCopies(plan, source, &link, &relay) == ultraepSuccess) == good);
  if (good) REQUIRE(relay.depth == plan->maxFanout && relay.maxReceives == direct.maxReceives);
  if (plan->nReplicas > 0) source[0] = (int32_t)fuzz_number(bytes, 4); /* whatever: an error or a result */
  ultraepPlanCopies(plan, source, &link, &relay);
  free(source);
}

static void fuzz_planner(fuzzBytes_t *bytes) {
  static const uint32_t tolerances[] = {0, 500, 300000, ULTRAEP_MAX_TOLERANCE_PPM};
  int32_t nRanks = 1 + fuzz_below(bytes, 16);
  ultraepPlannerConfig_t config = {.nRanks = nRanks,
                                   .nExperts = nRanks * (1 + fuzz_below(bytes, 8)),
                                   .nSlots = fuzz_below(bytes, 5),
                                   .nDomainRanks = fuzz_below(bytes, 4) ? 0 : 1 + fuzz_below(bytes, nRanks),
                                   .tolerancePpm = tolerances[fuzz_below(bytes, 4)],
                                   .rowPs = (uint32_t)fuzz_number(bytes, 2),
                                   .copyPs = fuzz_below(bytes, 2) ? fuzz_number(bytes, 4) : 0,
                                   .relayCopies = fuzz_below(bytes, 2),
                                   .replicaRows = fuzz_below(bytes, 2) ? 0 : 1 << fuzz_below(bytes, 21)};
  fuzz_overwrite(bytes, &config, sizeof(config));
  size_t nBytes = 0;
  ultraepResult_t result = ultraepPlannerWorkspaceSize(&config, &nBytes);
  bool good = ultraepPlannerConfigError(&config)[0] == '\0';
  REQUIRE(result == (good ? ultraepSuccess : ultraepInvalidArgument));
  if (!good || (int64_t)config.nRanks * config.nExperts > MAX_LOADS) return;

  int32_t *loads = malloc(sizeof(*loads) * (size_t)config.nRanks * (size_t)config.nExperts);
  void *workspace = malloc(nBytes);
  REQUIRE(loads != NULL && workspace != NULL);
  bool allowed = fuzz_loads(bytes, loads, &config);
  ultraepPlan_t plan;
  result = ultraepPlannerRun(&config, loads, workspace, nBytes, &plan);
  REQUIRE(result == (allowed ? ultraepSuccess : ultraepInvalidArgument));
  const char *flaw = allowed ? planner_plan_flaw(&config, loads, &plan) : NULL;
  if (flaw) fuzz_fail(__LINE__, flaw);
  if (allowed) fuzz_cost(bytes, &config, &plan);
  free(workspace);
  free(loads);
}

/* ---- programs of API calls ---- */

typedef struct {
  ultraepHostWorld_t world;
  ultraepConfig_t config;
  fuzzBytes_t bytes; /* the operations; every rank decodes all of them alike */
} fuzzProgram_t;

typedef struct {
  int rank, nRanks;
  const fuzzProgram_t *program;
  ultraepConfig_t config;
  fuzzBytes_t bytes;
  bool idle; /* sits the present operation out */
  ultraepGroup_t group;
  ultraepRoute_t routes[N_HANDLES];
  unsigned char *regions[N_HANDLES];
  size_t regionBytes[N_HANDLES];
  unsigned char *own, *grads; /* [OWN_BYTES] */
  unsigned char *tokens[2];   /* [maxTokens][hidden] of the widest type, and SPARE */
  unsigned char *scales;      /* [maxTokens][scaleBytes], and SPARE */
} fuzzRank_t;

/* What a dispatch of the group's type needs, and not a byte more. */
static size_t fuzz_recv_bytes(const ultraepConfig_t *config, int nRanks) {
  return (size_t)config_recv_rows(config, nRanks) * (size_t)config->hidden *
         config_type_bytes(config->dataType);
}

static size_t fuzz_token_bytes(const ultraepConfig_t *config) {
  return (size_t)config->maxTokens * (size_t)config->hidden * sizeof(float);
}

static bool fuzz_is_small(const ultraepConfig_t *config, int nRanks) {
  int64_t rows = config_recv_rows(config, nRanks), routes = config->maxRoutes;
  int64_t entries = (int64_t)config->maxTokens * config->topK;
  int64_t most = (int64_t)1 << 24; /* first, so that no product overflows */
  if (rows > most || entries > most) return false;
  return rows * (4 * config->hidden + config->scaleBytes + 16 * routes) + 32 * entries * routes +
             config->nSlots * 65536 <=
         MAX_GROUP_BYTES;
}

static size_t fuzz_region_bytes(fuzzBytes_t *bytes, const ultraepConfig_t *config, int nRanks) {
  switch (fuzz_below(bytes, 4)) {
  case 0:
    return (size_t)fuzz_number(bytes, 2);
  case 1:
    return fuzz_below(bytes, 2) ? 0 : SIZE_MAX >> fuzz_below(bytes, 16);
  default:
    return fuzz_recv_bytes(config, nRanks) + (size_t)fuzz_below(bytes, 3) * 1024;
  }
}

/* A place in one of the regions, or null, or memory that no group knows. */
static void *fuzz_symmetric(fuzzRank_t *self) {
  int which = fuzz_below(&self->bytes, N_HANDLES + 2), offset = fuzz_below(&self->bytes, 4);
  size_t start = offset == 0 ? 0 : offset == 1 ? fuzz_number(&self->bytes, 1) : 256 * (size_t)offset;
  if (which == N_HANDLES) return NULL;
  if (which > N_HANDLES || !self->regions[which]) return self->tokens[0] + offset;
  return start <= self->regionBytes[which] ? self->regions[which] + start : self->regions[which];
}

/* Room for `needed` bytes: a buffer of the rank's own that has it, a region if it does, or null. */
static void *fuzz_anywhere(fuzzRank_t *self, unsigned char *own, size_t needed) {
  int which = fuzz_below(&self->bytes, 16), offset = fuzz_below(&self->bytes, 8);
  if (which == 0) return NULL;
  if (which <= N_HANDLES && self->regionBytes[which - 1] >= needed) return self->regions[which - 1];
  return own + (offset == 7 ? 1 : offset == 6 ? 32 : 0);
}

static void fuzz_op_route(fuzzRank_t *self) {
  int which = fuzz_below(&self->bytes, N_HANDLES);
  ultraepRoute_t *route = &self->routes[which];
  if (self->idle) return;
  if (*route) {
    fuzz_good(ultraepRouteDestroy(*route));
    *route = NULL;
  } else if (!fuzz_good(ultraepRouteCreate(self->group, route))) {
    REQUIRE(*route == NULL);
  }
}

/* Entries differ between the ranks; most are experts. */
static void fuzz_op_update(fuzzRank_t *self) {
  planner_random_t random = {.state = fuzz_number(&self->bytes, 4) * 64 + (uint64_t)self->rank};
  ultraepRoute_t route = self->routes[fuzz_below(&self->bytes, N_HANDLES)];
  int nTokens = self->config.maxTokens, kind = fuzz_below(&self->bytes, 8);
  int weights = fuzz_below(&self->bytes, 3), bad = fuzz_below(&self->bytes, 24);
  if (kind == 0) nTokens = (int)(int32_t)fuzz_limit(&self->bytes);
  if (kind == 1) nTokens = planner_random_below(&random, nTokens + 1);
  if (kind == 2) nTokens = 0;
  if (self->idle) return;
  size_t room = nTokens > 0 && nTokens <= self->config.maxTokens ? (size_t)nTokens : 0;
  size_t n = room * (size_t)self->config.topK;
  int32_t *topkIdx = malloc(n * sizeof(*topkIdx) + 1);
  float *topkWeights = malloc(n * sizeof(*topkWeights) + 1);
  REQUIRE(topkIdx != NULL && topkWeights != NULL);
  for (size_t i = 0; i < n; i++) {
    topkIdx[i] = planner_random_below(&random, self->config.nExperts + 1) - 1;
    if (kind == 3) topkIdx[i] = 0;
    uint32_t bits = (uint32_t)planner_random_next(&random);
    memcpy(&topkWeights[i], &bits, sizeof(bits));
  }
  bool isBad = (bad == 1 || bad == 2) && n > 0 && self->rank == self->nRanks - 1;
  if (isBad) topkIdx[n - 1] = bad == 1 ? self->config.nExperts : -2;
  bool given = weights == 2 || (weights == 1 && self->rank == 0);
  ultraepResult_t result =
      ultraepRouteUpdate(route, bad == 3 ? NULL : topkIdx, given ? topkWeights : NULL, nTokens, NULL);
  REQUIRE(!fuzz_good(result) || !isBad);
  free(topkIdx);
  free(topkWeights);
}

static void fuzz_op_memory(fuzzRank_t *self) {
  int which = fuzz_below(&self->bytes, N_HANDLES), kind = fuzz_below(&self->bytes, 4);
  size_t offset = (size_t)fuzz_below(&self->bytes, 4) * 4096 + (size_t)(fuzz_below(&self->bytes, 16) == 0);
  size_t bytes = fuzz_region_bytes(&self->bytes, &self->config, self->nRanks);
  if (self->idle) return;
  unsigned char **region = &self->regions[which];
  if (*region) {
    void *start = kind == 0 ? *region + 16 : *region;
    if (!fuzz_good(ultraepMemFree(self->group, start))) return;
    *region = NULL;
    self->regionBytes[which] = 0;
    return;
  }
  void *made = NULL;
  if (kind == 0) {
    if (bytes > 0 && bytes <= OWN_BYTES) bytes = bytes < OWN_BYTES - offset ? bytes : OWN_BYTES - offset;
    if (bytes > OWN_BYTES) bytes = 0;
    if (fuzz_good(ultraepMemRegister(self->group, self->own + offset, bytes))) made = self->own + offset;
  } else if (!fuzz_good(ultraepMemAlloc(self->group, &made, bytes))) {
    REQUIRE(made == NULL);
  }
  if (!made) return;
  if (kind != 0) memset(made, 0x3c, bytes);
  *region = made;
  self->regionBytes[which] = bytes;
}

static void fuzz_op_alltoall(fuzzRank_t *self) {
  ultraepRoute_t route = self->routes[fuzz_below(&self->bytes, N_HANDLES)];
  int direction = fuzz_below(&self->bytes, 13) % 4, simple = fuzz_below(&self->bytes, 2);
  size_t nTokens = (size_t)self->config.maxTokens, tokenBytes = fuzz_token_bytes(&self->config);
  ultraepTensors_t tensors = ULTRAEP_TENSORS_INITIALIZER;
  tensors.dataType = fuzz_below(&self->bytes, 2) ? ULTRAEP_DATATYPE_DEFAULT : fuzz_below(&self->bytes, 6);
  void *symmetric = fuzz_symmetric(self);
  void *anywhere = fuzz_anywhere(self, self->tokens[0], tokenBytes);
  tensors.sendbuff = direction == ULTRAEP_DISPATCH ? anywhere : symmetric;
  tensors.recvbuff = direction == ULTRAEP_DISPATCH ? symmetric : anywhere;
  if (fuzz_below(&self->bytes, 2)) {
    tensors.sendScales = fuzz_anywhere(self, self->scales, nTokens * (size_t)self->config.scaleBytes);
    tensors.recvScales = fuzz_symmetric(self);
  }
  if (fuzz_below(&self->bytes, 2)) tensors.recvWeights = fuzz_symmetric(self);
  int header = fuzz_below(&self->bytes, 16);
  if (header < 3) {
    uint32_t number = (uint32_t)fuzz_limit(&self->bytes);
    if (header == 0) tensors.size = number;
    if (header == 1) tensors.version = number;
    if (header == 2) tensors.reserved = (int32_t)number;
  }
  if (self->idle) return;
  if (simple)
    fuzz_good(
        ultraepAllToAll(tensors.sendbuff, tensors.recvbuff, (ultraepDirection_t)direction, route, NULL));
  else
    fuzz_good(ultraepAllToAllTensors(&tensors, (ultraepDirection_t)direction, route, NULL));
}

static void fuzz_op_register(fuzzRank_t *self) {
  int layer = fuzz_below(&self->bytes, 4) - 1;
  ultraepExperts_t experts = ULTRAEP_EXPERTS_INITIALIZER;
  experts.nWeights = 1 + fuzz_below(&self->bytes, 3);
  experts.nGrads = fuzz_below(&self->bytes, 3);
  size_t bytes = 16 * (size_t)(1 + fuzz_below(&self->bytes, 16));
  bool fits = bytes * (size_t)(self->config.nExperts / self->nRanks) <= GRAD_BYTES;
  for (int t = 0; t < ULTRAEP_MAX_TENSORS; t++) {
    bool used = t < 3;
    int32_t type = used && fuzz_below(&self->bytes, 2) ? fuzz_below(&self->bytes, 4) : ULTRAEP_FLOAT32;
    experts.weights[t] = (ultraepExpertTensor_t){used ? fuzz_symmetric(self) : NULL, bytes, 0, 0};
    experts.grads[t] =
        (ultraepExpertTensor_t){fits ? self->grads + GRAD_BYTES * (size_t)t : NULL, bytes, type, 0};
  }
  fuzz_overwrite(&self->bytes, &experts, offsetof(ultraepExperts_t, weights));
  if (!self->idle) fuzz_good(ultraepExpertsRegister(self->group, layer, &experts));
}

static void fuzz_op_sync(fuzzRank_t *self) {
  ultraepRoute_t route = self->routes[fuzz_below(&self->bytes, N_HANDLES)];
  int layer = fuzz_below(&self->bytes, 4) - 1, grads = fuzz_below(&self->bytes, 2);
  if (self->idle) return;
  fuzz_good(grads ? ultraepGradsReduce(route, layer, NULL) : ultraepWeightsSync(route, layer, NULL));
}

static void fuzz_op_look(fuzzRank_t *self) {
  static char nothing[1024]; /* no group and no route: its magic is 0 */
  int which = fuzz_below(&self->bytes, N_HANDLES), kind = fuzz_below(&self->bytes, 32);
  ultraepRoute_t route = kind == 0 ? (ultraepRoute_t)(void *)nothing : self->routes[which];
  ultraepGroup_t group = kind == 1 ? (ultraepGroup_t)(void *)nothing : kind == 2 ? NULL : self->group;
  if (self->idle) return;
  ultraepGroupProperties_t properties;
  ultraepCounters_t counters;
  ultraepStatus_t status;
  ultraepSegments_t segments = {0};
  ultraepPlan_t plan = {0};
  fuzz_good(ultraepGroupProperties(group, kind == 3 ? NULL : &properties));
  fuzz_good(ultraepGroupCounters(group, kind == 3 ? NULL : &counters));
  fuzz_good(ultraepGroupStatus(group, kind == 3 ? NULL : &status));
  if (fuzz_good(ultraepRouteSegments(route, kind == 3 ? NULL : &segments)))
    REQUIRE(segments.firstRow && segments.firstRow[0] == 0 &&
            *segments.totalRows <= config_recv_rows(&self->config, self->nRanks));
  if (fuzz_good(ultraepRoutePlan(route, kind == 3 ? NULL : &plan))) REQUIRE(plan.maxPlanned >= plan.bound);
  if (kind == 31) fuzz_good(ultraepGroupAbort(group));
}

/* Half of all programs start where exchanges are possible, so that a short input gets there. */
static void fuzz_prepare(fuzzRank_t *self) {
  if (fuzz_below(&self->bytes, 2)) return;
  size_t bytes = fuzz_recv_bytes(&self->config, self->nRanks);
  for (int i = 0; i < 2; i++) {
    void *made;
    if (!fuzz_good(ultraepMemAlloc(self->group, &made, bytes))) return;
    memset(made, 0x3c, bytes);
    self->regions[i] = made;
    self->regionBytes[i] = bytes;
  }
  ultraepExperts_t experts = ULTRAEP_EXPERTS_INITIALIZER;
  experts.nWeights = experts.nGrads = 1;
  experts.weights[0] = (ultraepExpertTensor_t){self->regions[1], 16, 0, 0};
  experts.grads[0] = (ultraepExpertTensor_t){self->grads, 16, ULTRAEP_FLOAT32, 0};
  fuzz_good(ultraepExpertsRegister(self->group, 0, &experts));
  fuzz_good(ultraepRouteCreate(self->group, &self->routes[0]));
  fuzz_op_update(self);
}

static void fuzz_rank_run(fuzzRank_t *self) {
  static void (*const operations[])(fuzzRank_t *) = {
      fuzz_op_route,  fuzz_op_update,   fuzz_op_memory,   fuzz_op_update, fuzz_op_alltoall,
      fuzz_op_memory, fuzz_op_alltoall, fuzz_op_register, fuzz_op_sync,   fuzz_op_look};
  fuzz_prepare(self);
  for (int i = 0; i < MAX_OPERATIONS && self->bytes.left > 0; i++) {
    uint64_t word = fuzz_number(&self->bytes, 1);
    self->idle = word >= 250 && (int)(word - 250) == self->rank;
    operations[word % (sizeof(operations) / sizeof(operations[0]))](self);
  }
}

static void *fuzz_rank_main(void *arg) {
  fuzzRank_t *self = arg;
  self->config = self->program->config;
  self->bytes = self->program->bytes;
  if (!fuzz_good(ultraepGroupCreateHost(&self->group, self->program->world, self->rank, &self->config))) {
    REQUIRE(self->group == NULL);
    return NULL;
  }
  size_t tokenBytes = fuzz_token_bytes(&self->config) + SPARE;
  size_t scaleBytes = (size_t)self->config.maxTokens * (size_t)self->config.scaleBytes + SPARE;
  self->own = calloc(1, OWN_BYTES);
  self->grads = calloc(1, OWN_BYTES);
  self->tokens[0] = calloc(1, tokenBytes);
  self->tokens[1] = calloc(1, tokenBytes);
  self->scales = calloc(1, scaleBytes);
  REQUIRE(self->own && self->grads && self->tokens[0] && self->tokens[1] && self->scales);
  fuzz_rank_run(self);
  REQUIRE(ultraepGroupDestroy(self->group) == ultraepSuccess);
  free(self->own);
  free(self->grads);
  free(self->tokens[0]);
  free(self->tokens[1]);
  free(self->scales);
  return NULL;
}

static void fuzz_program(fuzzBytes_t *bytes) {
  fuzzProgram_t program = {0};
  int nRanks = 1 + fuzz_below(bytes, MAX_RANKS);
  program.config = fuzz_config(bytes, nRanks);
  if (program.config.timeoutMs > MAX_TIMEOUT_MS) program.config.timeoutMs = MAX_TIMEOUT_MS;
  if (config_check(&program.config, nRanks) == ultraepSuccess && !fuzz_is_small(&program.config, nRanks))
    return;
  program.bytes = *bytes;
  REQUIRE(ultraepHostWorldCreate(&program.world, nRanks) == ultraepSuccess);
  fuzzRank_t ranks[MAX_RANKS];
  pthread_t threads[MAX_RANKS];
  for (int r = 0; r < nRanks; r++) {
    ranks[r] = (fuzzRank_t){.rank = r, .nRanks = nRanks, .program = &program};
    if (r > 0) REQUIRE(pthread_create(&threads[r], NULL, fuzz_rank_main, &ranks[r]) == 0);
  }
  fuzz_rank_main(&ranks[0]);
  for (int r = 1; r < nRanks; r++) REQUIRE(pthread_join(threads[r], NULL) == 0);
  REQUIRE(ultraepHostWorldDestroy(program.world) == ultraepSuccess);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  fuzzBytes_t bytes = {.next = data, .left = size};
  switch (fuzz_below(&bytes, 6)) {
  case 0:
    fuzz_checks(&bytes);
    break;
  case 1:
    fuzz_experts(&bytes);
    break;
  case 2:
    fuzz_planner(&bytes);
    break;
  default:
    fuzz_program(&bytes);
  }
  return 0;
}
