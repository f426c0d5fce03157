#include "moe.h"

#include "bench_options.h"

#include <argp.h>
#include <stdlib.h>

enum {
  KEY_INTER = KEY_OWN,
  KEY_LAYERS,
  KEY_GEMM,
  KEY_STREAMS,
  KEY_PIECE,
  KEY_OVERLAP,
  KEY_EXPERT_CTAS,
  KEY_GRADS,
  KEY_SLOT_GRADS,
  KEY_IDEAL,
  KEY_GATE,
  KEY_LINK,
  KEY_ROW,
  KEY_EXPERT
};

const char *const moeGemmModes[2] = {"each", "grouped"};
const char *const moeGradsModes[2] = {"ordered", "unordered"};
const char *const moeSlotGrads[2] = {"leave", "clear"};

static const char moeDoc[] =
    "Times a whole Mixture-of-Experts layer, forward and backward: unbalanced, balanced, and with traffic "
    "that "
    "is even by itself, the ideal.\v"
    "Three lines for each record of the traffic, in milliseconds. before and after: imbalance, the maximum "
    "over "
    "ranks of rows received divided by their mean, with masters only and as run. total: from a meeting of "
    "all "
    "ranks to the end of the slowest. mlp: the slowest rank's; route, weights, dispatch, combine and grads: "
    "those of the rank that took least, since the others wait there for the slowest. All are medians of the "
    "iterations. tokens/s: tokens of all ranks over total. ideal: the ideal's total over this one's, in per "
    "cent; speed-up: the unbalanced total over this one's. -J also has every rank's rows, experts with rows "
    "and times, its waits for others in exchanges included.\n\n"
    "The ideal run has as many tokens and assignments on every rank; --ideal random: every token draws its "
    "experts, as with Megatron-LM's --moe-router-force-load-balancing, so that loads differ by chance; "
    "--ideal even: dealt so that all experts get the same. Like the unbalanced run it has no replicas, and "
    "no "
    "time for weights and gradients. GB: memory in use by all ranks, GPUs: communicators included. J/1000: "
    "joules of the GPUs for 1000 tokens, where NVML counts them.\n\n"
    "-c 1 checks after the last iteration. out, dx, dW: how far the balanced run's outputs, input gradients "
    "and "
    "weight gradients are from the unbalanced run's, as ||a - b|| / ||b||, the worst rank (dW: the worst "
    "expert). -B host: out and dx must be equal to the bit unless --combine partial, dW within 1e-5, for it "
    "is "
    "added up in another order. -B cuda: all within 1e-2, for cuBLAS may use another kernel for another "
    "number "
    "of rows. Of every run: sample, one token of every rank against a calculation in double precision that "
    "knows nothing of ranks (one layer only), within 3e-2; sums, the identities <dW2, W2> = <dOut, out> and "
    "<dW1, W1> = <dx, x> over all ranks, within 1e-2.\n\n"
    "Matrix products are a small loop in C on the host, and cuBLAS on GPUs: --gemm each, one product after "
    "the "
    "other for each expert; --gemm grouped, cublasGemmGroupedBatchedEx for all but the weight gradients, "
    "which "
    "are fp32 sums of bfloat16 products, which that call does not have. The host reads the number of rows of "
    "each expert once a layer, while dispatch runs; all three runs do. Fill, reading and checks are not "
    "timed, "
    "nor is the clearing of the masters' gradients.\n\n"
    "--overlap 1: weights go on a second stream beside dispatch and the masters' first products, and "
    "gradients "
    "beside the last products (of input gradients); the phases that they go beside then hold their time. "
    "--expert-ctas leaves SMs to the products; with --ctas it must not be more than the SMs that a rank "
    "has. Ranks that are threads on one GPU share its 32 hardware queues: a stream for each rank, one more "
    "with --overlap, and --streams less one. What stands behind another rank's wait in a queue waits, "
    "too.\n\n"
    "--gate 1: the library keeps only replicas that save more time than their weights and gradients cost to "
    "move. A line under the balanced one says what it weighed; the run then has room for as many rows as the "
    "unbalanced one.\n\n"
    "Exit status: 0; 1 where something is wrong or fails; 2 where the options are at fault.";

static const struct argp_option moeOptionTable[] = {
    BENCH_OPTIONS_RUN,
    BENCH_OPTIONS_TRAFFIC("Tokens a rank, traces are scaled to it (4096; -B host: 64)",
                          "Elements of a token (7168; -B host: 256)",
                          "Experts (64; with a trace, the trace's)"),
    BENCH_OPTIONS_GROUP,
    {"iters", 'n', "N", 0, "Timed iterations (20; -B host: 3)", 1},
    {"warmup_iters", 'w', "N", 0, "Iterations before them, at least one (2)", 1},
    {"check", 'c', "0|1", 0, "Check the results of the last iteration (1)", 1},
    {"inter", KEY_INTER, "N", 0, "Elements between an expert's two matrices (2048; -B host: 128)", 2},
    {"layers", KEY_LAYERS, "N", 0, "Layers one after another (1)", 2},
    {"ideal", KEY_IDEAL, "even|random", 0,
     "Experts of the ideal run: dealt evenly, or drawn by each token (random)", 2},
    {"gate", KEY_GATE, "0|1", 0, "Leave out replicas that cost more than they save (0)", 3},
    {"link-gbps", KEY_LINK, "GB/S", 0, "Rate of a rank's link, for the cost gate (measured on GPUs)", 3},
    {"expert-us", KEY_EXPERT, "US", 0,
     "Time that one more expert costs its rank however few its rows, forward and backward, for the gate (0)",
     3},
    {"row-us", KEY_ROW, "US", 0,
     "Time that a row costs its rank, forward and backward, for the gate (the library's)", 3},
    {"grads", KEY_GRADS, "ordered|unordered", 0, "Order in which replicas' gradients are added (ordered)", 2},
    {"slot-grads", KEY_SLOT_GRADS, "leave|clear", 0,
     "What becomes of replicas' gradients when they have been added: products write them anew (leave)", 2},
    {"gemm", KEY_GEMM, "each|grouped", 0, "How cuBLAS multiplies (each)", 4},
    {"streams", KEY_STREAMS, "N", 0, "Products of different experts at a time, with --gemm each (1)", 4},
    {"piece-rows", KEY_PIECE, "N", 0,
     "Make products of more rows than so many in pieces, as steps of 128, 0: whole (16384; --gemm grouped: "
     "0)",
     4},
    {"overlap", KEY_OVERLAP, "0|1", 0,
     "Move the weights of replicas beside the masters' products, and their gradients beside the last ones "
     "(0)",
     4},
    {"expert-ctas", KEY_EXPERT_CTAS, "N", 0, "Most SMs that move weights and gradients, 0: as --ctas (0)", 4},
    {0}};

static int moe_option_apply(int key, const char *text, moeOptions_t *options, perfError_t *error) {
  double number = 0;
  int status;
  switch (key) {
  case KEY_INTER:
    return optionInt32("--inter", text, 1, 1 << 20, &options->inter, error);
  case KEY_LAYERS:
    return optionInt32("--layers", text, 1, MOE_MAX_LAYERS, &options->nLayers, error);
  case KEY_GEMM:
    return optionName("--gemm", text, moeGemmModes, 2, &options->gemm, error);
  case KEY_STREAMS:
    return optionInt32("--streams", text, 1, MOE_MAX_STREAMS, &options->nStreams, error);
  case KEY_PIECE:
    return optionInt32("--piece-rows", text, 0, 1 << 30, &options->pieceRows, error);
  case KEY_OVERLAP:
    return optionInt32("--overlap", text, 0, 1, &options->overlap, error);
  case KEY_EXPERT_CTAS:
    return optionInt32("--expert-ctas", text, 0, 1024, &options->expertCtas, error);
  case KEY_GRADS:
    return optionName("--grads", text, moeGradsModes, 2, &options->gradsMode, error);
  case KEY_SLOT_GRADS:
    return optionName("--slot-grads", text, moeSlotGrads, 2, &options->slotGrads, error);
  case KEY_IDEAL:
    return optionName("--ideal", text, workloadIdeals, 2, &options->ideal, error);
  case KEY_GATE:
    return optionInt32("--gate", text, 0, 1, &options->gate, error);
  case KEY_LINK:
    status = optionDouble("--link-gbps", text, 0.001, 1e6, &number, error);
    options->linkBytesPerSecond = number * 1e9;
    return status;
  case KEY_ROW:
    status = optionDouble("--row-us", text, 1e-6, 1e6, &number, error);
    options->rowSeconds = number / 1e6;
    return status;
  case KEY_EXPERT:
    status = optionDouble("--expert-us", text, 0, 1e6, &number, error);
    options->expertSeconds = number / 1e6;
    return status;
  default:
    return benchOptionApply(key, text, &options->bench, error);
  }
}

/* A value that was not given (0, tokens -1) depends on where the ranks live. */
static int moe_options_finish(moeOptions_t *options, perfError_t *error) {
  benchOptions_t *bench = &options->bench;
  bool host = bench->backend == BENCH_BACKEND_HOST;
  if (bench->hidden == 0) bench->hidden = host ? 256 : 7168;
  if (bench->nTokens < 0) bench->nTokens = host ? 64 : 4096;
  if (bench->iters == 0) bench->iters = host ? 3 : 20;
  if (options->inter == 0) options->inter = host ? 128 : 2048;
  if (bench->warmupIters < 1) return perfErrorSet(error, "--warmup_iters: at least one");
  if (options->inter % 16 != 0) return perfErrorSet(error, "--inter must be a multiple of 16");
  if (host && (options->gemm != MOE_GEMM_EACH || options->nStreams > 1))
    return perfErrorSet(error, "--gemm and --streams need -B cuda");
  if (options->pieceRows < 0) options->pieceRows = options->gemm == MOE_GEMM_GROUPED ? 0 : 16384;
  if (options->pieceRows % MOE_PIECE_ALIGN != 0)
    return perfErrorSet(error, "--piece-rows must be a multiple of %d", MOE_PIECE_ALIGN);
  if (options->gemm == MOE_GEMM_GROUPED && options->pieceRows > 0)
    return perfErrorSet(error, "--piece-rows needs --gemm each");
  if (options->gemm != MOE_GEMM_EACH && options->nStreams > 1)
    return perfErrorSet(error, "--streams needs --gemm each");
  if (!options->gate &&
      (options->linkBytesPerSecond > 0 || options->rowSeconds > 0 || options->expertSeconds > 0))
    return perfErrorSet(error, "--link-gbps, --row-us and --expert-us need --gate 1");
  return benchOptionsFinish(bench, error);
}

static error_t moe_option_parse(int key, char *text, struct argp_state *state) {
  moeOptions_t *options = state->input;
  perfError_t error;
  int status = 1;
  if (key == ARGP_KEY_END) {
    status = moe_options_finish(options, &error);
  } else if (key == ARGP_KEY_ARG) {
    status = perfErrorSet(&error, "unexpected argument '%s'", text);
  } else {
    status = moe_option_apply(key, text, options, &error);
  }
  if (status < 0) argp_error(state, "%s", error.text);
  return status > 0 ? ARGP_ERR_UNKNOWN : 0;
}

void moeOptionsParse(moeOptions_t *options, int argc, char **argv) {
  static const struct argp parser = {moeOptionTable, moe_option_parse, NULL, moeDoc, NULL, NULL, NULL};
  *options = (moeOptions_t){.bench = benchOptionsDefault(),
                            .nLayers = 1,
                            .nStreams = 1,
                            .pieceRows = -1,
                            .ideal = WORKLOAD_IDEAL_RANDOM};
  options->bench.hidden = 0;
  options->bench.iters = 0;
  options->bench.warmupIters = 2;
  argp_err_exit_status = PERF_EXIT_USAGE;
  if (argp_parse(&parser, argc, argv, 0, NULL, options) != 0) exit(PERF_EXIT_USAGE);
}
