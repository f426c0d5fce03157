#include "bench_options.h"

#include "bench_job.h"

#include <argp.h>
#include <stdlib.h>
#include <string.h>

const char *const benchDispatchModes[3] = {"auto", "direct", "once"};
const char *const benchCombineModes[2] = {"exact", "partial"};
static const char *const benchBackends[] = {"host", "cuda"};
static const char *const benchBaselines[] = {"none", "nccl"};
static const char *const benchGradTypes[] = {"none", "float32", "bfloat16"};
static const char *const benchBalances[] = {"0", "1", "both"};
static const char *const benchTypes[] = {"bfloat16", "half", "float", "fp8"};

static const char benchDoc[] =
    "Times and checks UltraEP's dispatch and combine, unbalanced and balanced.\v"
    "A line for each size or record and each balance setting. size and count: tokens of one rank, in bytes "
    "and "
    "elements. before and after: imbalance, the maximum over ranks of rows received divided by their mean, "
    "with "
    "masters only and as run. Times are microseconds, the median over iterations of the time from the first "
    "rank's "
    "start to the last rank's end; a rank's start follows a barrier.\n\n"
    "algbw and busbw are alltoallv_perf's: algbw = B / time, B the bytes of the rank that sends or receives "
    "most, rows "
    "to itself included (the same B for dispatch and for combine, which goes the other way); busbw = algbw * "
    "(R-1)/R. "
    "As B is larger where ranks are uneven, compare times, not bandwidths, between balance 0 and 1.\n\n"
    "#wrong counts rows (dispatch), tokens (combine), replicas (weights) and masters and slots (gradients) "
    "that are not byte for byte what an "
    "independent check expects, over all iterations, warm-up included. It knows the tokens and where they "
    "were "
    "routed, not the library's layout: every row of an expert's segment must be a token routed to it, in "
    "order of "
    "source rank and token, every assignment must arrive once, padding must stay untouched, and each "
    "combined token "
    "must equal the weighted fp32 sum in order of k.\n\n"
    "The memcpy line copies as many bytes with as many threads in the same iterations; dispatch and combine "
    "each move "
    "that many.\n\n"
    "-B cuda: ranks are threads, rank r on GPU r mod GPUs, or, under mpirun, processes. Times are taken on "
    "the "
    "GPUs, of the slowest rank, for -m calls one after the other; with -c 0 after one untimed call in which "
    "the "
    "ranks meet, so that they do not tell when each thread of the host came (short phases need -c 0, -m and "
    "--graph 1). route+d: route and dispatch one after the other. floor and %: the bytes that must be read "
    "and "
    "written (dispatch: tokens once, and rows; combine: rows, and tokens) at the rate at which a GPU copies "
    "within its memory, measured in the same run, and that as a share of the time; with ranks on GPUs of "
    "their "
    "own the links are slower than that. GPU GB: memory in use, of all ranks together, communicators and "
    "buffers "
    "included. --expert-bytes: weights are read and written once for every replica; --grads: gradients for "
    "every "
    "replica, whose slot is cleared, and every master that has some. --baseline nccl: base, the same rows "
    "from rank to rank by one group of ncclSend and ncclRecv "
    "with "
    "counts known beforehand, without routing, packing and sums; x, base's time over ours. Loads of masters "
    "only "
    "for balance 0, the plan's for balance 1.\n\n"
    "--trace runs the records of a load trace: each source's counts become tokens whose loads are exactly "
    "these. "
    "--tokens (or -b -e) scales the counts first. --routing runs the tokens of a routing trace.\n\n"
    "Exit status: 0; 1 where something is wrong or fails; 2 where the options are at fault.";

static const struct argp_option benchOptionTable[] = {
    BENCH_OPTIONS_RUN,
    BENCH_OPTIONS_TRAFFIC("Tokens a rank, instead of -b -e", "Elements of a token (4096)",
                          "Experts (64; with a trace, the trace's)"),
    BENCH_OPTIONS_GROUP,
    {"minbytes", 'b', "BYTES", 0, "Least size: bytes of tokens a rank, K M G allowed (4M)", 1},
    {"maxbytes", 'e', "BYTES", 0, "Largest size (as -b)", 1},
    {"stepfactor", 'f', "N", 0, "Factor between sizes (2)", 1},
    {"iters", 'n', "N", 0, "Timed iterations (20)", 1},
    {"warmup_iters", 'w', "N", 0, "Iterations before them (1)", 1},
    {"agg_iters", 'm', "N", 0, "Calls of each operation in one timed iteration (1; -B cuda -c 0: 10)", 1},
    {"check", 'c', "0|1", 0, "Check every iteration (1)", 1},
    {"datatype", 'd', "TYPE", 0, "bfloat16, half, float, or fp8 with scales out and bfloat16 back (bfloat16)",
     1},
    {"balance", KEY_BALANCE, "0|1|both", 0, "Masters only, with replicas, or one after the other (both)", 3},
    {"expert-bytes", KEY_EXPERT_BYTES, "BYTES", 0,
     "Weights of an expert that go to its replicas, 0: none (64K; -B cuda: 0)", 3},
    {"grads", KEY_GRAD_TYPE, "none|float32|bfloat16", 0,
     "Also reduce gradients of as many bytes as --expert-bytes from replicas into masters (none)", 3},
    {"gate-bytes", KEY_GATE_BYTES, "BYTES", 0,
     "Weights of an expert as the cost gate sees it, 0: no gate (0)", 3},
    {"graph", KEY_GRAPH, "0|1", 0, "Capture the calls of each phase in a CUDA graph and launch that (0)", 4},
    {"baseline", KEY_BASELINE, "none|nccl", 0, "Also move the same rows with ncclSend and ncclRecv (none)",
     4},
    {"matrix", KEY_MATRIX, "FILE", 0,
     "Write the bytes of the first line's dispatch from rank to rank, for nccl-tests' alltoallv_perf", 4},
    {0}};

static int bench_type_parse(const char *text, benchOptions_t *options, perfError_t *error) {
  /* The order of benchTypes is that of ultraepDataType_t. */
  return optionName("--datatype", text, benchTypes, 4, &options->dataType, error);
}

static int bench_common_option_apply(int key, const char *text, benchOptions_t *options, perfError_t *error) {
  const int64_t most = INT64_C(1) << 40;
  switch (key) {
  case 'B':
    return optionName("--backend", text, benchBackends, 2, &options->backend, error);
  case 't':
    return optionInt32("--nthreads", text, 1, ULTRAEP_MAX_RANKS, &options->nRanks, error);
  case 'b':
    options->sized = true;
    return optionBytes("--minbytes", text, 0, most, &options->minBytes, error);
  case 'e':
    options->sized = true;
    return optionBytes("--maxbytes", text, 0, most, &options->maxBytes, error);
  case 'f':
    return optionInt32("--stepfactor", text, 2, 1 << 20, &options->stepFactor, error);
  case 'n':
    return optionInt32("--iters", text, 1, 1 << 20, &options->iters, error);
  case 'w':
    return optionInt32("--warmup_iters", text, 0, 1 << 20, &options->warmupIters, error);
  case 'm':
    return optionInt32("--agg_iters", text, 1, 1 << 20, &options->aggIters, error);
  case 'c':
    return optionInt32("--check", text, 0, 1, &options->check, error);
  case 'd':
    return bench_type_parse(text, options, error);
  case 'J':
    options->jsonPath = text;
    return 0;
  default:
    return 1;
  }
}

static int bench_own_option_apply(int key, const char *text, benchOptions_t *options, perfError_t *error) {
  switch (key) {
  case KEY_TOKENS:
    return optionInt32("--tokens", text, 0, WORKLOAD_MAX_TOKENS, &options->nTokens, error);
  case KEY_HIDDEN:
    return optionInt32("--hidden", text, 1, 1 << 20, &options->hidden, error);
  case KEY_TOPK:
    return optionInt32("--topk", text, 1, ULTRAEP_MAX_TOPK, &options->topK, error);
  case KEY_EXPERTS:
    return optionInt32("--experts", text, 1, ULTRAEP_MAX_EXPERTS, &options->nExperts, error);
  case KEY_SKEW:
    return optionDouble("--skew", text, 1, ULTRAEP_MAX_RANKS, &options->skew, error);
  case KEY_TRACE:
    options->tracePath = text;
    return 0;
  case KEY_ROUTING:
    options->routingPath = text;
    return 0;
  case KEY_LAYER:
    return optionInt("--layer", text, 0, INT64_MAX, &options->layer, error);
  case KEY_LIMIT:
    return optionInt("--limit", text, 1, INT64_MAX, &options->limit, error);
  case KEY_SEED:
    return optionInt("--seed", text, 0, INT64_MAX, &options->seed, error);
  case KEY_SLOTS:
    return optionInt32("--slots", text, 0, ULTRAEP_MAX_SLOTS, &options->nSlots, error);
  case KEY_BALANCE:
    return optionName("--balance", text, benchBalances, 3, &options->balance, error);
  case KEY_ALIGN:
    return optionInt32("--align", text, 1, 4096, &options->alignment, error);
  case KEY_DOMAIN:
    return optionInt32("--domain", text, 1, ULTRAEP_MAX_RANKS, &options->nDomainRanks, error);
  case KEY_TOLERANCE:
    return optionDouble("--tolerance", text, 0, 1000, &options->tolerance, error);
  case KEY_REPLICA_ROWS:
    return optionInt32("--replica-rows", text, 0, ULTRAEP_MAX_REPLICA_ROWS, &options->replicaRows, error);
  case KEY_MODE:
    return optionName("--mode", text, benchDispatchModes, 3, &options->dispatchMode, error);
  case KEY_COMBINE:
    return optionName("--combine", text, benchCombineModes, 2, &options->combineMode, error);
  case KEY_TIMEOUT:
    return optionInt32("--timeout", text, 1, 3600000, &options->timeoutMs, error);
  case KEY_EXPERT_BYTES:
    return optionBytes("--expert-bytes", text, 0, INT64_C(1) << 32, &options->expertBytes, error);
  case KEY_GRAD_TYPE:
    return optionName("--grads", text, benchGradTypes, 3, &options->grads, error);
  case KEY_GATE_BYTES:
    return optionBytes("--gate-bytes", text, 0, INT64_C(1) << 40, &options->gateBytes, error);
  case KEY_CTAS:
    return optionInt32("--ctas", text, 0, 1024, &options->maxCtas, error);
  case KEY_GRAPH:
    return optionInt32("--graph", text, 0, 1, &options->graph, error);
  case KEY_BASELINE:
    return optionName("--baseline", text, benchBaselines, 2, &options->baseline, error);
  case KEY_MATRIX:
    options->matrixPath = text;
    return 0;
  default:
    return 1;
  }
}

int benchOptionApply(int key, const char *text, benchOptions_t *options, perfError_t *error) {
  int status = bench_common_option_apply(key, text, options, error);
  return status > 0 ? bench_own_option_apply(key, text, options, error) : status;
}

/* Where the ranks are, and what follows from that. */
static int bench_backend_finish(benchOptions_t *options, perfError_t *error) {
  bool host = options->backend == BENCH_BACKEND_HOST;
  options->nProcesses = benchJobProcesses();
  if (options->nProcesses > 1) {
    if (host)
      return perfErrorSet(error, "-B host: ranks are threads of one process, start it without mpirun");
    if (options->nRanks != 0 && options->nRanks != options->nProcesses) {
      return perfErrorSet(error, "--nthreads: under mpirun a rank is a process, and these are %d",
                          options->nProcesses);
    }
    if (options->nProcesses > ULTRAEP_MAX_RANKS)
      return perfErrorSet(error, "%d processes are more than %d", options->nProcesses, ULTRAEP_MAX_RANKS);
    options->nRanks = options->nProcesses;
  }
  if (options->nRanks == 0) options->nRanks = 8;
  if (host && (options->graph || options->baseline != BENCH_BASELINE_NONE)) {
    return perfErrorSet(error, "--graph and --baseline need -B cuda");
  }
  if (options->aggIters == 0) options->aggIters = host || options->check ? 1 : 10;
  if (options->expertBytes < 0) options->expertBytes = host ? 64 << 10 : 0;
  return 0;
}

int benchOptionsFinish(benchOptions_t *options, perfError_t *error) {
  if (bench_backend_finish(options, error) != 0) return -1;
  bool traced = options->tracePath != NULL, routed = options->routingPath != NULL;
  if (traced + routed + (options->skew > 0) > 1) {
    return perfErrorSet(error, "--skew, --trace and --routing exclude each other");
  }
  if (traced && options->nExperts != 0) return perfErrorSet(error, "--experts: a load trace has its own");
  if (routed && options->topK != 0) return perfErrorSet(error, "--topk: a routing trace has its own");
  if (!traced && (options->layer >= 0 || options->limit > 0)) {
    return perfErrorSet(error, "--layer and --limit choose records of a load trace");
  }
  if (options->sized && options->nTokens >= 0)
    return perfErrorSet(error, "--tokens and -b -e exclude each other");
  if (options->minBytes < 0) options->minBytes = options->maxBytes < 0 ? 4 << 20 : options->maxBytes;
  if (options->maxBytes < 0) options->maxBytes = options->minBytes;
  if (options->maxBytes < options->minBytes) return perfErrorSet(error, "--maxbytes is less than --minbytes");
  if (options->topK == 0) options->topK = 8;
  if (!traced && !routed) {
    if (options->nExperts == 0) options->nExperts = 64;
    if (options->skew == 0) options->skew = 4;
    if (options->nExperts % options->nRanks != 0) {
      return perfErrorSet(error, "--experts: %d is no multiple of %d ranks", options->nExperts,
                          options->nRanks);
    }
  }
  if (options->nDomainRanks == 0) options->nDomainRanks = options->nRanks;
  if (options->nRanks % options->nDomainRanks != 0) {
    return perfErrorSet(error, "--domain: %d does not divide %d ranks", options->nDomainRanks,
                        options->nRanks);
  }
  if (options->expertBytes % 16 != 0) return perfErrorSet(error, "--expert-bytes must be a multiple of 16");
  if (options->grads != BENCH_GRADS_NONE && options->expertBytes == 0)
    return perfErrorSet(error, "--grads needs --expert-bytes");
  if (options->grads != BENCH_GRADS_NONE && options->gateBytes > 0)
    return perfErrorSet(error, "--grads and --gate-bytes exclude each other: what the check expects comes of "
                               "a plan that is known beforehand");
  if (options->hidden % 16 != 0) return perfErrorSet(error, "--hidden must be a multiple of 16");
  return 0;
}

static error_t bench_option_parse(int key, char *text, struct argp_state *state) {
  benchOptions_t *options = state->input;
  perfError_t error;
  if (key == ARGP_KEY_ARG) argp_error(state, "unexpected argument '%s'", text);
  if (key == ARGP_KEY_END) {
    if (benchOptionsFinish(options, &error) != 0) argp_error(state, "%s", error.text);
    return 0;
  }
  int status = benchOptionApply(key, text, options, &error);
  if (status < 0) argp_error(state, "%s", error.text);
  return status > 0 ? ARGP_ERR_UNKNOWN : 0;
}

benchOptions_t benchOptionsDefault(void) {
  return (benchOptions_t){.minBytes = -1,
                          .maxBytes = -1,
                          .stepFactor = 2,
                          .iters = 20,
                          .warmupIters = 1,
                          .check = 1,
                          .dataType = ULTRAEP_BFLOAT16,
                          .nTokens = -1,
                          .hidden = 4096,
                          .layer = -1,
                          .seed = 1,
                          .nSlots = 2,
                          .alignment = 1,
                          .balance = BENCH_BALANCE_BOTH,
                          .timeoutMs = 30000,
                          .expertBytes = -1};
}

void benchOptionsParse(benchOptions_t *options, int argc, char **argv) {
  static const struct argp parser = {benchOptionTable, bench_option_parse, NULL, benchDoc, NULL, NULL, NULL};
  *options = benchOptionsDefault();
  argp_err_exit_status = PERF_EXIT_USAGE;
  if (argp_parse(&parser, argc, argv, 0, NULL, options) != 0) exit(PERF_EXIT_USAGE);
}
