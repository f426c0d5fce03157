#include "config.h"

#include "error.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#define DEFAULT_LINK_BYTES_PER_SECOND 400e9 /* an H100's NVLink in one direction */
#define DEFAULT_BYTES_PER_ROW_SECOND                                                                         \
  600e12                  /* one flop a byte of bf16 weights; fp8: half the bytes, twice the rate */
#define DEFAULT_BLOCKS 16 /* SMs */
#define PICOSECONDS 1e12
/* Measured between two H200s: what kernels move over a link in one direction, and what a thread block reads
 * and writes in memory at most. */
#define DISPATCH_LINK_BYTES_PER_SECOND 360e9
#define DISPATCH_BLOCK_BYTES_PER_SECOND 95e9
#define DISPATCH_MEMORY_BYTES_PER_SECOND 4e12
#define DISPATCH_ONCE_SECONDS 30e-6 /* a meeting of all ranks more, and what the copies are found by */

/* ---- data types ---- */

size_t config_type_bytes(int32_t dataType) {
  switch (dataType) {
  case ULTRAEP_BFLOAT16:
  case ULTRAEP_FLOAT16:
    return 2;
  case ULTRAEP_FLOAT32:
    return 4;
  case ULTRAEP_FLOAT8:
  case ULTRAEP_BYTES:
    return 1;
  default:
    return 0;
  }
}

const char *config_type_name(int32_t dataType) {
  switch (dataType) {
  case ULTRAEP_BFLOAT16:
    return "bfloat16";
  case ULTRAEP_FLOAT16:
    return "float16";
  case ULTRAEP_FLOAT32:
    return "float32";
  case ULTRAEP_FLOAT8:
    return "float8";
  case ULTRAEP_BYTES:
    return "bytes";
  default:
    return "unknown";
  }
}

bool config_type_adds(int32_t dataType) {
  return dataType == ULTRAEP_BFLOAT16 || dataType == ULTRAEP_FLOAT16 || dataType == ULTRAEP_FLOAT32;
}

ultraepResult_t config_row_bytes(const ultraepConfig_t *config, int32_t dataType, size_t *rowBytes) {
  size_t typeBytes = config_type_bytes(dataType);
  if (typeBytes == 0)
    return error_set(ultraepInvalidArgument, "dataType %d is not an ultraepDataType_t", dataType);
  size_t bytes = (size_t)config->hidden * typeBytes;
  if (bytes < CONFIG_MIN_ROW_BYTES || bytes > CONFIG_MAX_ROW_BYTES || bytes % 16 != 0)
    return error_set(ultraepInvalidArgument,
                     "a row of hidden = %d %s elements has %zu bytes: must be a multiple of 16, in 16..%d",
                     config->hidden, config_type_name(dataType), bytes, CONFIG_MAX_ROW_BYTES);
  *rowBytes = bytes;
  return ultraepSuccess;
}

/* ---- the config ---- */

static ultraepResult_t config_check_header(const char *what, size_t size, size_t expected, uint32_t magic,
                                           uint32_t version) {
  if (magic != ULTRAEP_MAGIC)
    return error_set(ultraepInvalidArgument, "%s: bad magic 0x%08x: start from the initializer macro", what,
                     magic);
  if (size != expected)
    return error_set(ultraepInvalidArgument, "%s: size is %zu, this library's is %zu", what, size, expected);
  if (version / 10000 != ULTRAEP_VERSION_MAJOR || version > ULTRAEP_VERSION_CODE || version == 0)
    return error_set(ultraepInvalidArgument, "%s: made for version %u, this library is %d", what, version,
                     ULTRAEP_VERSION_CODE);
  return ultraepSuccess;
}

typedef struct {
  const char *name;
  int64_t value, min, max;
} configRange_t;

static ultraepResult_t config_check_ranges(const configRange_t *ranges, size_t n) {
  for (size_t i = 0; i < n; i++)
    if (ranges[i].value < ranges[i].min || ranges[i].value > ranges[i].max)
      return error_set(ultraepInvalidArgument, "config.%s is %lld: must be in %lld..%lld", ranges[i].name,
                       (long long)ranges[i].value, (long long)ranges[i].min, (long long)ranges[i].max);
  return ultraepSuccess;
}

/* Not-a-number fails every comparison, so the tests are for what is allowed. */
static ultraepResult_t config_check_real(const char *name, double value, double max) {
  if (value >= 0 && value <= max) return ultraepSuccess;
  return error_set(ultraepInvalidArgument, "config.%s is %g: must be in 0..%g", name, value, max);
}

/* ---- the cost gate ---- */

/* What one more row, and one more copy of an expert, cost. bytes = 0: no gate. */
typedef struct {
  double copyBytes;   /* over a link, for each copy */
  double workBytes;   /* weights that a row is multiplied with, each as often as it is */
  int32_t nCrossings; /* times that a row crosses a link */
} configWork_t;

static configWork_t config_work(const ultraepConfig_t *config, const ultraepExperts_t *experts) {
  if (config->expertBytes > 0)
    return (configWork_t){(double)config->expertBytes, (double)config->expertBytes, 2};
  if (config->expertBytes == 0 || !experts) return (configWork_t){0, 0, 0};
  double weights = 0, grads = 0;
  for (int t = 0; t < experts->nWeights; t++) weights += (double)experts->weights[t].bytes;
  for (int t = 0; t < experts->nGrads; t++) grads += (double)experts->grads[t].bytes;
  if (experts->nGrads == 0) return (configWork_t){weights, weights, 2};
  /* Backward: the gradients of inputs and of weights, each as much work as forward; rows there and back once
   * more. Layers share the slots, so the weights come a second time. */
  return (configWork_t){2 * weights + grads, 3 * weights, 4};
}

static double config_pick(double given, double measured, double otherwise) {
  return given > 0 ? given : measured > 0 ? measured : otherwise;
}

/* Picoseconds of a row and of a copy; the config's data type must be good. */
static void config_costs(const ultraepConfig_t *config, const configRates_t *measured,
                         const configWork_t *work, double *row, double *copy) {
  const configRates_t none = {0, 0}, *rates = measured ? measured : &none;
  double link =
      config_pick(config->linkBytesPerSecond, rates->linkBytesPerSecond, DEFAULT_LINK_BYTES_PER_SECOND);
  double speed = config_pick(0, rates->weightBytesPerSecond, DEFAULT_BYTES_PER_ROW_SECOND);
  double rowBytes = (double)config->hidden * (double)config_type_bytes(config->dataType);
  *row = PICOSECONDS *
         config_pick(config->rowSeconds, 0, work->workBytes / speed + work->nCrossings * rowBytes / link);
  *copy = PICOSECONDS * (work->copyBytes / link + config->expertSeconds);
}

void config_gate(const ultraepConfig_t *config, const configRates_t *measured,
                 const ultraepExperts_t *experts, ultraepPlannerConfig_t *planner) {
  configWork_t work = config_work(config, experts);
  double row, copy;
  planner->rowPs = 0;
  planner->copyPs = 0;
  planner->relayCopies = 0;
  if (work.copyBytes <= 0) return;
  config_costs(config, measured, &work, &row, &copy);
  /* What is measured or registered may leave the planner's range, which then still tells dear from cheap; and
   * a cost that rounds to nothing must not switch the gate off. */
  planner->rowPs = (uint32_t)llround(fmin(fmax(row, 1), ULTRAEP_MAX_ROW_PS));
  planner->copyPs = (uint64_t)llround(fmin(fmax(copy, 1), (double)ULTRAEP_MAX_COPY_PS));
  planner->relayCopies = 1;
}

static ultraepResult_t config_check_cost(const ultraepConfig_t *config) {
  ultraepResult_t result = config_check_real("tolerance", config->tolerance, ULTRAEP_MAX_TOLERANCE_PPM / 1e6);
  if (result == ultraepSuccess)
    result = config_check_real("linkBytesPerSecond", config->linkBytesPerSecond, 1e18);
  if (result == ultraepSuccess) result = config_check_real("rowSeconds", config->rowSeconds, 1.0);
  if (result == ultraepSuccess) result = config_check_real("expertSeconds", config->expertSeconds, 1.0);
  if (result != ultraepSuccess || config->expertBytes == 0) return result;
  configWork_t work = config_work(config, NULL);
  double row, copy;
  config_costs(config, NULL, &work, &row, &copy);
  if (!(row <= ULTRAEP_MAX_ROW_PS))
    return error_set(ultraepInvalidArgument,
                     "the cost gate takes at most %g s a row: rowSeconds = %g, expertBytes = %lld, hidden = "
                     "%d and linkBytesPerSecond = %g make %g s",
                     ULTRAEP_MAX_ROW_PS / PICOSECONDS, config->rowSeconds, (long long)config->expertBytes,
                     config->hidden, config->linkBytesPerSecond, row / PICOSECONDS);
  if (!(copy <= (double)ULTRAEP_MAX_COPY_PS))
    return error_set(
        ultraepInvalidArgument,
        "the cost gate takes at most %g s a copy: expertBytes = %lld at linkBytesPerSecond = %g and "
        "expertSeconds = %g make %g s",
        (double)ULTRAEP_MAX_COPY_PS / PICOSECONDS, (long long)config->expertBytes, config->linkBytesPerSecond,
        config->expertSeconds, copy / PICOSECONDS);
  return ultraepSuccess;
}

/* ---- the config's rules ---- */

static ultraepResult_t config_check_divisions(const ultraepConfig_t *config, int nRanks) {
  if (config->nExperts % nRanks != 0)
    return error_set(ultraepInvalidArgument, "config.nExperts = %d is not a multiple of the %d ranks",
                     config->nExperts, nRanks);
  if (config->domainRanks != 0 && nRanks % config->domainRanks != 0)
    return error_set(ultraepInvalidArgument, "config.domainRanks = %d does not divide the %d ranks",
                     config->domainRanks, nRanks);
  if (config->scaleBytes % 4 != 0)
    return error_set(ultraepInvalidArgument, "config.scaleBytes = %d is not a multiple of 4",
                     config->scaleBytes);
  for (size_t i = 0; i < sizeof(config->reserved) / sizeof(config->reserved[0]); i++)
    if (config->reserved[i] != 0)
      return error_set(ultraepInvalidArgument, "config.reserved[%zu] is %d: must be 0", i,
                       config->reserved[i]);
  return ultraepSuccess;
}

ultraepResult_t config_check(const ultraepConfig_t *config, int nRanks) {
  if (!config) return error_set(ultraepInvalidArgument, "config is null");
  ultraepResult_t result =
      config_check_header("config", config->size, sizeof(*config), config->magic, config->version);
  if (result != ultraepSuccess) return result;
  if (nRanks < 1 || nRanks > ULTRAEP_MAX_RANKS)
    return error_set(ultraepInvalidArgument, "%d ranks: must be in 1..%d", nRanks, ULTRAEP_MAX_RANKS);
  const configRange_t ranges[] = {
      {"nExperts", config->nExperts, 1, ULTRAEP_MAX_EXPERTS},
      {"topK", config->topK, 1, ULTRAEP_MAX_TOPK},
      {"maxTokens", config->maxTokens, 1, CONFIG_MAX_TOKENS},
      {"hidden", config->hidden, 1, CONFIG_MAX_ROW_BYTES},
      {"dataType", config->dataType, ULTRAEP_BFLOAT16, ULTRAEP_BYTES},
      {"scaleBytes", config->scaleBytes, 0, 65536},
      {"nSlots", config->nSlots, 0, ULTRAEP_MAX_SLOTS},
      {"balance", config->balance, 0, 1},
      {"domainRanks", config->domainRanks, 0, nRanks},
      {"alignment", config->alignment, 1, CONFIG_MAX_ALIGNMENT},
      {"maxRecvRows", config->maxRecvRows, 0, CONFIG_MAX_RECV_ROWS},
      {"expertBytes", config->expertBytes, ULTRAEP_EXPERT_BYTES_REGISTERED, CONFIG_MAX_EXPERT_BYTES},
      {"dispatchMode", config->dispatchMode, ULTRAEP_DISPATCH_AUTO, ULTRAEP_DISPATCH_ONCE},
      {"combineMode", config->combineMode, ULTRAEP_COMBINE_EXACT, ULTRAEP_COMBINE_PARTIAL},
      {"gradsMode", config->gradsMode, ULTRAEP_GRADS_ORDERED, ULTRAEP_GRADS_UNORDERED | ULTRAEP_GRADS_LEAVE},
      {"peers", config->peers, ULTRAEP_PEERS_AUTO, ULTRAEP_PEERS_IPC},
      {"maxRoutes", config->maxRoutes, 1, CONFIG_MAX_ROUTES},
      {"maxCtas", config->maxCtas, 0, 65535},
      {"expertCtas", config->expertCtas, 0, 65535},
      {"timeoutMs", config->timeoutMs, 1, 3600000},
      {"replicaRows", config->replicaRows, 0, ULTRAEP_MAX_REPLICA_ROWS},
  };
  result = config_check_ranges(ranges, sizeof(ranges) / sizeof(ranges[0]));
  if (result == ultraepSuccess) result = config_check_divisions(config, nRanks);
  if (result == ultraepSuccess) result = config_check_cost(config);
  size_t rowBytes;
  if (result == ultraepSuccess) result = config_row_bytes(config, config->dataType, &rowBytes);
  return result;
}

const char *config_difference(const ultraepConfig_t *a, const ultraepConfig_t *b) {
#define DIFFERS(field)                                                                                       \
  if (a->field != b->field) return #field
  DIFFERS(nExperts);
  DIFFERS(topK);
  DIFFERS(maxTokens);
  DIFFERS(hidden);
  DIFFERS(dataType);
  DIFFERS(scaleBytes);
  DIFFERS(nSlots);
  DIFFERS(balance);
  DIFFERS(domainRanks);
  DIFFERS(alignment);
  DIFFERS(maxRecvRows);
  DIFFERS(tolerance);
  DIFFERS(expertBytes);
  DIFFERS(linkBytesPerSecond);
  DIFFERS(rowSeconds);
  DIFFERS(expertSeconds);
  DIFFERS(dispatchMode);
  DIFFERS(combineMode);
  DIFFERS(gradsMode);
  DIFFERS(peers);
  DIFFERS(maxRoutes);
  DIFFERS(maxCtas);
  DIFFERS(expertCtas);
  DIFFERS(timeoutMs);
  DIFFERS(replicaRows);
  DIFFERS(version);
#undef DIFFERS
  return NULL;
}

bool config_peers_read(const char *text, int32_t *peers) {
  static const char *const words[] = {CONFIG_PEERS_WORDS};
  return config_read_word(words, sizeof(words) / sizeof(words[0]), text, peers);
}

const char *config_peers_choose(const configPeers_t *ranks, int nRanks, int32_t *peers, int *rank) {
  int wishing = -1, without = -1;
  for (int r = 0; r < nRanks; r++) {
    *rank = r;
    if (without < 0 && !ranks[r].hasWindows) without = r;
    if (ranks[r].wish == ULTRAEP_PEERS_AUTO) continue;
    if (wishing >= 0 && ranks[r].wish != ranks[wishing].wish)
      return "windows and IPC are both wished for by config.peers or ULTRAEP_PEERS, the second time";
    wishing = r;
  }
  int32_t chosen = wishing >= 0   ? ranks[wishing].wish
                   : without >= 0 ? ULTRAEP_PEERS_IPC
                                  : ULTRAEP_PEERS_WINDOW;
  *rank = without;
  if (chosen == ULTRAEP_PEERS_WINDOW && without >= 0)
    return "windows are wished for by config.peers or ULTRAEP_PEERS, and NCCL has none (they need NCCL 2.29 "
           "or later)";
  *peers = chosen;
  return NULL;
}

ultraepPlannerConfig_t config_planner(const ultraepConfig_t *config, int nRanks, int nDomainRanks) {
  ultraepPlannerConfig_t planner = {
      .nRanks = nRanks,
      .nExperts = config->nExperts,
      .nSlots = config->balance ? config->nSlots : 0,
      .nDomainRanks = nDomainRanks,
      .tolerancePpm = (uint32_t)llround(config->tolerance * 1e6),
      .replicaRows = config->replicaRows,
  };
  config_gate(config, NULL, NULL, &planner);
  return planner;
}

/* Copies that a rank can have to receive, or to send. */
static double config_most_copies(const ultraepConfig_t *config, int nRanks) {
  return fmax(config->nSlots, (double)config->nExperts / nRanks);
}

static int64_t config_padding(const ultraepConfig_t *config, int nRanks) {
  return (int64_t)(config->nExperts / nRanks + config->nSlots) * (config->alignment - 1);
}

/* Rows that replicas' worth may leave on a rank above what a full balance would: there a rank has nSlots
 * replicas at most, and what has none need not be less busy than that. */
static int64_t config_replica_rows(const ultraepConfig_t *config) {
  return config->balance ? (int64_t)config->nSlots * config->replicaRows : 0;
}

void config_gate_limit(const ultraepConfig_t *config, int nRanks, int64_t maxRecvRows,
                       ultraepPlannerConfig_t *planner) {
  if (planner->copyPs == 0) return;
  int64_t full = (int64_t)config->maxTokens * config->topK;
  int64_t taken = config_padding(config, nRanks) + config_replica_rows(config) + full;
  double room = fmax(0, (double)(maxRecvRows - taken));
  double most = fmax(1, floor(room * planner->rowPs / config_most_copies(config, nRanks)));
  if ((double)planner->copyPs > most) planner->copyPs = (uint64_t)most;
}

/* Rows that the gate may leave on a rank above what a full balance would: those that cost as much as all the
 * copies that a rank can have to receive, or to send. */
static double config_gate_rows(const ultraepConfig_t *config, int nRanks) {
  if (!config->balance || config->nSlots == 0 || config->expertBytes == 0) return 0;
  /* Nothing is registered yet: training, with gradients of twice the weights' bytes. */
  configWork_t work = config->expertBytes > 0 ? config_work(config, NULL) : (configWork_t){4, 3, 0};
  ultraepConfig_t rates = *config;
  double row, copy, copies = config_most_copies(config, nRanks);
  if (config->expertBytes < 0) rates.rowSeconds = 0;
  config_costs(&rates, NULL, &work, &row, &copy);
  return row > 0 ? ceil(copies * copy / row) : INFINITY;
}

int32_t config_blocks(const ultraepConfig_t *config) {
  return config->maxCtas > 0 ? config->maxCtas : DEFAULT_BLOCKS;
}

int32_t config_dispatch_mode(const ultraepConfig_t *config, int nRanks, bool ownDevices) {
  double link = config->linkBytesPerSecond;
  if (config->dispatchMode != ULTRAEP_DISPATCH_AUTO) return config->dispatchMode;
  if (link <= 0 && !ownDevices) return ULTRAEP_DISPATCH_DIRECT;
  if (link <= 0) link = DISPATCH_LINK_BYTES_PER_SECOND;
  /* Ranks that a token goes to, if every rank is as likely as another for each of its rows. Rows that stay on
   * their rank are moved alike in both modes. */
  double topK = config->topK, ranks = nRanks * (1 - pow(1 - 1.0 / nRanks, topK)), peers = 1 - 1.0 / nRanks;
  double bytes = (double)config->maxTokens * config->hidden * (double)config_type_bytes(config->dataType);
  double memory =
      fmin(config_blocks(config) * DISPATCH_BLOCK_BYTES_PER_SECOND, DISPATCH_MEMORY_BYTES_PER_SECOND);
  double direct = bytes * topK * peers / link;
  double once =
      bytes * ranks * peers / link + 2 * bytes * (topK - ranks) * peers / memory + DISPATCH_ONCE_SECONDS;
  return once < direct ? ULTRAEP_DISPATCH_ONCE : ULTRAEP_DISPATCH_DIRECT;
}

int64_t config_recv_rows(const ultraepConfig_t *config, int nRanks) {
  if (config->maxRecvRows > 0) return config->maxRecvRows;
  int64_t full = (int64_t)config->maxTokens * config->topK; /* what one rank can send */
  int64_t padding = config_padding(config, nRanks);
  double rows = (double)(nRanks > 1 ? 2 : 1) * (double)full;
  double most = fmin((double)nRanks * (double)full, (double)(CONFIG_MAX_RECV_ROWS - padding));
  double left = config_gate_rows(config, nRanks) + (double)config_replica_rows(config);
  double gated = fmin((double)full + left, most);
  return (int64_t)fmax(rows, gated) + padding;
}

/* ---- tensors ---- */

typedef struct {
  const char *name;
  const void *start;
  uint64_t bytes;
} configBuffer_t;

static ultraepResult_t config_check_buffers(const configBuffer_t *buffers, int n) {
  for (int i = 0; i < n; i++) {
    uintptr_t start = (uintptr_t)buffers[i].start;
    if (start % 16 != 0)
      return error_set(ultraepInvalidArgument, "%s = %p is not aligned to 16 bytes", buffers[i].name,
                       buffers[i].start);
    if (buffers[i].bytes > UINTPTR_MAX - start)
      return error_set(ultraepInvalidArgument, "%s = %p has no room for %llu bytes", buffers[i].name,
                       buffers[i].start, (unsigned long long)buffers[i].bytes);
  }
  for (int i = 0; i < n; i++)
    for (int j = 0; j < i; j++) {
      uintptr_t a = (uintptr_t)buffers[i].start, b = (uintptr_t)buffers[j].start;
      if (buffers[i].bytes && buffers[j].bytes && a < b + buffers[j].bytes && b < a + buffers[i].bytes)
        return error_set(ultraepInvalidArgument, "%s and %s overlap", buffers[j].name, buffers[i].name);
    }
  return ultraepSuccess;
}

static ultraepResult_t config_check_scales(const ultraepConfig_t *config, const ultraepTensors_t *tensors,
                                           int64_t nTokens) {
  if (config->scaleBytes == 0 && (tensors->sendScales || tensors->recvScales))
    return error_set(ultraepInvalidUsage, "scales given, but config.scaleBytes is 0");
  if (tensors->sendScales && !tensors->recvScales)
    return error_set(ultraepInvalidArgument, "sendScales is set and recvScales is null");
  if (tensors->recvScales && !tensors->sendScales && nTokens > 0)
    return error_set(ultraepInvalidArgument, "recvScales is set and sendScales is null");
  return ultraepSuccess;
}

static ultraepResult_t config_check_dispatch(const ultraepConfig_t *config, const ultraepTensors_t *tensors,
                                             size_t rowBytes, uint64_t nTokens, uint64_t maxRecvRows) {
  if (!tensors->sendbuff && nTokens > 0) return error_set(ultraepInvalidArgument, "sendbuff is null");
  if (!tensors->recvbuff) return error_set(ultraepInvalidArgument, "recvbuff is null");
  ultraepResult_t result = config_check_scales(config, tensors, (int64_t)nTokens);
  if (result != ultraepSuccess) return result;
  uint64_t scaleBytes = (uint64_t)config->scaleBytes;
  const configBuffer_t buffers[] = {
      {"sendbuff", tensors->sendbuff, tensors->sendbuff ? nTokens * rowBytes : 0},
      {"recvbuff", tensors->recvbuff, maxRecvRows * rowBytes},
      {"sendScales", tensors->sendScales, tensors->sendScales ? nTokens * scaleBytes : 0},
      {"recvScales", tensors->recvScales, tensors->recvScales ? maxRecvRows * scaleBytes : 0},
      {"recvWeights", tensors->recvWeights, tensors->recvWeights ? maxRecvRows * sizeof(float) : 0},
  };
  return config_check_buffers(buffers, sizeof(buffers) / sizeof(buffers[0]));
}

static ultraepResult_t config_check_combine(const ultraepConfig_t *config, const ultraepTensors_t *tensors,
                                            size_t rowBytes, uint64_t nTokens, uint64_t maxRecvRows) {
  if (!config_type_adds(tensors->dataType))
    return error_set(ultraepInvalidUsage, "%s cannot be combined: only bfloat16, float16 and float32 can",
                     config_type_name(tensors->dataType));
  if (config->combineMode == ULTRAEP_COMBINE_PARTIAL && tensors->dataType == ULTRAEP_FLOAT32 &&
      config->dataType != ULTRAEP_FLOAT32)
    return error_set(ultraepInvalidUsage,
                     "ULTRAEP_COMBINE_PARTIAL has no room for float32 partial sums in a group of %s",
                     config_type_name(config->dataType));
  if (!tensors->sendbuff) return error_set(ultraepInvalidArgument, "sendbuff is null");
  if (!tensors->recvbuff && nTokens > 0) return error_set(ultraepInvalidArgument, "recvbuff is null");
  if (tensors->sendScales || tensors->recvScales || tensors->recvWeights)
    return error_set(ultraepInvalidArgument, "a combine takes no scales and no recvWeights");
  const configBuffer_t buffers[] = {
      {"sendbuff", tensors->sendbuff, maxRecvRows * rowBytes},
      {"recvbuff", tensors->recvbuff, tensors->recvbuff ? nTokens * rowBytes : 0},
  };
  return config_check_buffers(buffers, sizeof(buffers) / sizeof(buffers[0]));
}

ultraepResult_t config_check_tensors(const ultraepConfig_t *config, const ultraepTensors_t *tensors,
                                     ultraepDirection_t direction, int64_t nTokens, int64_t maxRecvRows) {
  if (!tensors) return error_set(ultraepInvalidArgument, "tensors is null");
  ultraepResult_t result =
      config_check_header("tensors", tensors->size, sizeof(*tensors), tensors->magic, tensors->version);
  if (result != ultraepSuccess) return result;
  if (tensors->reserved != 0)
    return error_set(ultraepInvalidArgument, "tensors.reserved is %d: must be 0", tensors->reserved);
  ultraepTensors_t resolved = *tensors;
  if (resolved.dataType == ULTRAEP_DATATYPE_DEFAULT) resolved.dataType = config->dataType;
  size_t rowBytes;
  result = config_row_bytes(config, resolved.dataType, &rowBytes);
  if (result != ultraepSuccess) return result;
  switch ((int)direction) {
  case ULTRAEP_DISPATCH:
    return config_check_dispatch(config, &resolved, rowBytes, (uint64_t)nTokens, (uint64_t)maxRecvRows);
  case ULTRAEP_COMBINE:
  case ULTRAEP_COMBINE_SUM:
    return config_check_combine(config, &resolved, rowBytes, (uint64_t)nTokens, (uint64_t)maxRecvRows);
  default:
    return error_set(ultraepInvalidArgument, "direction %d is not an ultraepDirection_t", (int)direction);
  }
}

/* ---- expert tensors ---- */

static ultraepResult_t config_check_expert_tensor(const ultraepExpertTensor_t *tensor, const char *kind,
                                                  int index) {
  if (!tensor->master) return error_set(ultraepInvalidArgument, "%s[%d].master is null", kind, index);
  if ((uintptr_t)tensor->master % 16 != 0)
    return error_set(ultraepInvalidArgument, "%s[%d].master = %p is not aligned to 16 bytes", kind, index,
                     tensor->master);
  if (tensor->bytes == 0 || tensor->bytes % 16 != 0 || tensor->bytes > (size_t)CONFIG_MAX_EXPERT_BYTES)
    return error_set(ultraepInvalidArgument, "%s[%d].bytes is %zu: must be a multiple of 16, in 16..2^40",
                     kind, index, tensor->bytes);
  if (tensor->reserved != 0)
    return error_set(ultraepInvalidArgument, "%s[%d].reserved is %d: must be 0", kind, index,
                     tensor->reserved);
  return ultraepSuccess;
}

ultraepResult_t config_check_experts(const ultraepExperts_t *experts) {
  if (!experts) return error_set(ultraepInvalidArgument, "experts is null");
  ultraepResult_t result =
      config_check_header("experts", experts->size, sizeof(*experts), experts->magic, experts->version);
  if (result != ultraepSuccess) return result;
  if (experts->nWeights < 1 || experts->nWeights > ULTRAEP_MAX_TENSORS)
    return error_set(ultraepInvalidArgument, "experts.nWeights is %d: must be in 1..%d", experts->nWeights,
                     ULTRAEP_MAX_TENSORS);
  if (experts->nGrads < 0 || experts->nGrads > ULTRAEP_MAX_TENSORS)
    return error_set(ultraepInvalidArgument, "experts.nGrads is %d: must be in 0..%d", experts->nGrads,
                     ULTRAEP_MAX_TENSORS);
  for (int i = 0; i < experts->nWeights && result == ultraepSuccess; i++)
    result = config_check_expert_tensor(&experts->weights[i], "weights", i);
  for (int i = 0; i < experts->nGrads && result == ultraepSuccess; i++) {
    result = config_check_expert_tensor(&experts->grads[i], "grads", i);
    int32_t dataType = experts->grads[i].dataType;
    if (result == ultraepSuccess && dataType != ULTRAEP_FLOAT32 && dataType != ULTRAEP_BFLOAT16)
      result = error_set(ultraepInvalidArgument, "grads[%d].dataType is %s: must be float32 or bfloat16", i,
                         config_type_name(dataType));
  }
  return result;
}
