#include "plan_tool.h"

#include "ultraep.h"

#include <argp.h>
#include <stdlib.h>
#include <string.h>

enum {
  KEY_COST = 0x100,
  KEY_GATE,
  KEY_EXPERT_BYTES,
  KEY_LINK,
  KEY_ROW_NS,
  KEY_TFLOPS,
  KEY_TILE,
  KEY_HOP,
  KEY_ZIPF,
  KEY_EXPERTS,
  KEY_TOPK,
  KEY_TOKENS,
  KEY_RECORDS,
  KEY_SEED,
  KEY_LAYER,
  KEY_LIMIT,
  KEY_REPEAT,
  KEY_CHART,
  KEY_REPLICA_ROWS,
};

static const char planDoc[] =
    "Plans load matrices and says how good the plans are.\v"
    "One line a record. before, planned, realised and bound are imbalances: the maximum over ranks of "
    "assignments "
    "received, divided by their mean. planned is the plan's own figure; realised counts the assignments that "
    "arrive "
    "after the decomposition by source; no plan for this record can be below bound; gap is planned / bound - "
    "1. "
    "replicas: how many were made; fanout: the most of one expert; rankin: the most on one rank; local: the "
    "share of "
    "assignments whose expert instance is on their own rank; plan: microseconds, the median of the "
    "repeats.\n\n"
    "A load trace is a CSV file with the header step,layer,microbatch,src,e0.., one row for each source "
    "rank, or one "
    "with src -1 for counts summed over the sources. Source s of n becomes rank s*R/n; where n < R, and for "
    "summed "
    "records, counts are split evenly.\n\n"
    "--zipf makes traffic instead: expert l of rank r has weight (r+1)^-a * (l+1)^-4, with a such that the "
    "expected "
    "imbalance is RATIO.\n\n"
    "--cost says how long the weights of a plan's replicas take over links of given rates: direct, each "
    "master "
    "sending every copy itself, and relay, replicas passing tiles on along chains; with the busiest sender "
    "and "
    "receiver, the longest chain, and what the busiest link alone takes. --gate plans as the cost gate does, "
    "which weighs the rows of the busiest rank against copies over the busiest link, and says why.\n\n"
    "--json writes an object a line: step, layer, microbatch, before, planned, realised, bound, replicas, "
    "fanout, "
    "rank_in, plan_us, local, instances [[expert, rank, quota], ..], masters included; with --gate "
    "gate {kept, all, none_rows_us, gated, full, text, ..}, with --cost copies [{gbps, direct {us, sends, "
    "..}, relay {us, ..}}, ..]; the last line is {\"summary\": ..}. "
    "With --json - stdout carries nothing else.\n\n"
    "Exit status: 0; 1 where a file or a record is at fault; 2 where the options are.";

static const struct argp_option planOptionTable[] = {
    {"trace", 't', "FILE", 0, "Load trace to plan", 1},
    {"layer", KEY_LAYER, "N", 0, "Only records of this layer", 1},
    {"limit", KEY_LIMIT, "N", 0, "Only the first N records", 1},
    {"zipf", KEY_ZIPF, "RATIO", 0, "Made-up loads with this imbalance, 1 or more", 2},
    {"experts", KEY_EXPERTS, "E", 0, "zipf: experts (256)", 2},
    {"topk", KEY_TOPK, "K", 0, "zipf: experts of a token (8)", 2},
    {"tokens", KEY_TOKENS, "N", 0, "zipf: tokens on each rank (8192)", 2},
    {"records", KEY_RECORDS, "N", 0, "zipf: records to make (1)", 2},
    {"seed", KEY_SEED, "N", 0, "zipf: seed (1)", 2},
    {"ranks", 'r', "R", 0, "Ranks, required", 3},
    {"slots", 's', "S", 0, "Replica slots on each rank, required", 3},
    {"domain", 'd', "D", 0, "Replicas stay among D consecutive ranks (all)", 3},
    {"tolerance", 'x', "X", 0, "Balance to mean * (1 + X) and no further (0)", 3},
    {"replica-rows", KEY_REPLICA_ROWS, "N", 0, "What a replica costs its rank besides its rows, in rows (0)",
     3},
    {"gate", KEY_GATE, "relay|direct", OPTION_ARG_OPTIONAL,
     "Plan with the cost gate: fewer replicas where copies cost more than they save; copies as relayed or as "
     "sent by masters (off; relay)",
     4},
    {"cost", KEY_COST, NULL, 0, "Critical path of the weights' copies", 4},
    {"link", KEY_LINK, "GBS[,..]", 0, "GB/s of a rank's link, the gate's first (450,712,900)", 4},
    {"expert-bytes", KEY_EXPERT_BYTES, "BYTES", 0, "Weights of an expert, K M G allowed (36M)", 4},
    {"row-ns", KEY_ROW_NS, "NS", 0, "gate: what an assignment costs its rank (from --tflops)", 4},
    {"tflops", KEY_TFLOPS, "T", 0, "gate: the rate of experts, one flop a byte of weights (600)", 4},
    {"tile", KEY_TILE, "BYTES", 0, "cost: what a relay passes on in one go (16K)", 4},
    {"hop-us", KEY_HOP, "US", 0, "cost: from a tile's arrival to its use (2)", 4},
    {"repeat", KEY_REPEAT, "N", 0, "Plan each record N times (5)", 5},
    {"json", 'J', "FILE", 0, "Write JSON lines to FILE, - for stdout", 5},
    {"chart", KEY_CHART, "WHEN", 0,
     "Bar chart of the most skewed record: auto (on a terminal), always, never", 5},
    {0}};

static int plan_links_parse(const char *text, planOptions_t *options, perfError_t *error) {
  char copy[256];
  if (strlen(text) >= sizeof(copy)) return perfErrorSet(error, "--link: too long");
  memcpy(copy, text, strlen(text) + 1);
  char *at = copy;
  for (options->nLinks = 0; at != NULL; options->nLinks++) {
    char *comma = strchr(at, ',');
    if (comma != NULL) *comma++ = '\0';
    if (options->nLinks == PLAN_MAX_LINKS) return perfErrorSet(error, "--link: more than %d", PLAN_MAX_LINKS);
    if (optionDouble("--link", at, 1e-3, 1e9, &options->linkGbps[options->nLinks], error) != 0) return -1;
    at = comma;
  }
  return 0;
}

/* Options on what rows and copies cost; 1: not one of these. */
static int plan_cost_option_apply(int key, const char *text, planOptions_t *options, perfError_t *error) {
  static const char *const gateNames[] = {"off", "direct", "relay"};
  switch (key) {
  case KEY_COST:
    options->cost = true;
    return 0;
  case KEY_GATE:
    if (text != NULL) return optionName("--gate", text, gateNames, 3, &options->gate, error);
    options->gate = PLAN_GATE_RELAY;
    return 0;
  case KEY_LINK:
    return plan_links_parse(text, options, error);
  case KEY_EXPERT_BYTES:
    return optionBytes("--expert-bytes", text, 1, INT64_C(1) << 40, &options->expertBytes, error);
  case KEY_ROW_NS:
    return optionDouble("--row-ns", text, 1e-3, ULTRAEP_MAX_ROW_PS / 1e3, &options->rowNs, error);
  case KEY_TFLOPS:
    return optionDouble("--tflops", text, 1e-3, 1e9, &options->tflops, error);
  case KEY_TILE:
    return optionBytes("--tile", text, 1, INT64_C(1) << 40, &options->tileBytes, error);
  case KEY_HOP:
    return optionDouble("--hop-us", text, 0, 1e6, &options->hopUs, error);
  default:
    return 1;
  }
}

static int plan_option_apply(int key, const char *text, planOptions_t *options, perfError_t *error) {
  static const char *const chartNames[] = {"auto", "always", "never"};
  switch (key) {
  case 't':
    options->tracePath = text;
    return 0;
  case 'r':
    return optionInt32("--ranks", text, 1, ULTRAEP_MAX_RANKS, &options->nRanks, error);
  case 's':
    return optionInt32("--slots", text, 0, ULTRAEP_MAX_SLOTS, &options->nSlots, error);
  case 'd':
    return optionInt32("--domain", text, 1, ULTRAEP_MAX_RANKS, &options->nDomainRanks, error);
  case 'x':
    return optionDouble("--tolerance", text, 0, ULTRAEP_MAX_TOLERANCE_PPM / 1e6, &options->tolerance, error);
  case KEY_REPLICA_ROWS:
    return optionInt32("--replica-rows", text, 0, ULTRAEP_MAX_REPLICA_ROWS, &options->replicaRows, error);
  case 'J':
    options->jsonPath = text;
    return 0;
  case KEY_ZIPF:
    return optionDouble("--zipf", text, 1, ULTRAEP_MAX_RANKS, &options->zipfRatio, error);
  case KEY_EXPERTS:
    return optionInt32("--experts", text, 1, ULTRAEP_MAX_EXPERTS, &options->nExperts, error);
  case KEY_TOPK:
    return optionInt32("--topk", text, 1, ULTRAEP_MAX_TOPK, &options->topK, error);
  case KEY_TOKENS:
    return optionInt32("--tokens", text, 0, 1 << 24, &options->nTokens, error);
  case KEY_RECORDS:
    return optionInt32("--records", text, 1, 1 << 20, &options->nRecords, error);
  case KEY_SEED:
    return optionInt("--seed", text, 0, INT64_MAX, &options->seed, error);
  case KEY_LAYER:
    return optionInt("--layer", text, 0, INT64_MAX, &options->layer, error);
  case KEY_LIMIT:
    return optionInt("--limit", text, 1, INT64_MAX, &options->limit, error);
  case KEY_REPEAT:
    return optionInt32("--repeat", text, 1, 1 << 20, &options->repeat, error);
  case KEY_CHART:
    return optionName("--chart", text, chartNames, 3, &options->chart, error);
  default:
    return 1;
  }
}

static int plan_options_check(const planOptions_t *options, perfError_t *error) {
  if (options->nRanks == 0) return perfErrorSet(error, "--ranks is required");
  if (options->nSlots < 0) return perfErrorSet(error, "--slots is required");
  if ((options->tracePath != NULL) == (options->zipfRatio > 0)) {
    return perfErrorSet(error, "exactly one of --trace and --zipf is required");
  }
  if (options->nDomainRanks != 0 && options->nRanks % options->nDomainRanks != 0) {
    return perfErrorSet(error, "--domain: %d does not divide %d ranks", options->nDomainRanks,
                        options->nRanks);
  }
  if (options->zipfRatio > 0 && options->nExperts % options->nRanks != 0) {
    return perfErrorSet(error, "--experts: %d is no multiple of %d ranks", options->nExperts,
                        options->nRanks);
  }
  const char *fault = planCostFault(options);
  return fault == NULL ? 0 : perfErrorSet(error, "%s", fault);
}

static error_t plan_option_parse(int key, char *text, struct argp_state *state) {
  planOptions_t *options = state->input;
  perfError_t error;
  if (key == ARGP_KEY_ARG) argp_error(state, "unexpected argument '%s'", text);
  if (key == ARGP_KEY_END) {
    if (plan_options_check(options, &error) != 0) argp_error(state, "%s", error.text);
    return 0;
  }
  int status = plan_option_apply(key, text, options, &error);
  if (status > 0) status = plan_cost_option_apply(key, text, options, &error);
  if (status < 0) argp_error(state, "%s", error.text);
  return status > 0 ? ARGP_ERR_UNKNOWN : 0;
}

void planOptionsParse(planOptions_t *options, int argc, char **argv) {
  static const struct argp parser = {planOptionTable, plan_option_parse, NULL, planDoc, NULL, NULL, NULL};
  *options = (planOptions_t){.nSlots = -1,
                             .nExperts = 256,
                             .topK = 8,
                             .nTokens = 8192,
                             .nRecords = 1,
                             .seed = 1,
                             .layer = -1,
                             .repeat = 5,
                             .nLinks = 3,
                             .linkGbps = {450, 712, 900},
                             .expertBytes = 36 << 20,
                             .tflops = 600,
                             .tileBytes = 16 << 10,
                             .hopUs = 2,
                             .chart = PLAN_CHART_AUTO};
  argp_err_exit_status = PERF_EXIT_USAGE;
  if (argp_parse(&parser, argc, argv, 0, NULL, options) != 0) exit(PERF_EXIT_USAGE);
}
