/* Options that ultraep_perf shares with ultraep_moe: their keys, their rows in argp's tables, and what reads
 * them. */
#ifndef ULTRAEP_PERF_BENCH_OPTIONS_H_
#define ULTRAEP_PERF_BENCH_OPTIONS_H_

#include "bench.h"

/* Keys of options without a letter; a tool's own begin at KEY_OWN. */
enum {
  KEY_TOKENS = 0x100,
  KEY_HIDDEN,
  KEY_TOPK,
  KEY_EXPERTS,
  KEY_SLOTS,
  KEY_SKEW,
  KEY_TRACE,
  KEY_ROUTING,
  KEY_LAYER,
  KEY_LIMIT,
  KEY_SEED,
  KEY_BALANCE,
  KEY_ALIGN,
  KEY_DOMAIN,
  KEY_TOLERANCE,
  KEY_REPLICA_ROWS,
  KEY_MODE,
  KEY_COMBINE,
  KEY_TIMEOUT,
  KEY_EXPERT_BYTES,
  KEY_GRAD_TYPE,
  KEY_GATE_BYTES,
  KEY_CTAS,
  KEY_GRAPH,
  KEY_BASELINE,
  KEY_MATRIX,
  KEY_OWN = 0x200,
};

/* Rows of an argp table. The texts given say what tools differ in. */
#define BENCH_ROW(...)                                                                                       \
  { __VA_ARGS__ }
#define BENCH_OPTIONS_RUN                                                                                    \
  BENCH_ROW("backend", 'B', "host|cuda", 0, "Where ranks live: threads of this process, or GPUs (host)", 1), \
      BENCH_ROW("nthreads", 't', "R", 0, "Ranks, each a thread (8; under mpirun, the processes)", 1),        \
      BENCH_ROW("output_file", 'J', "FILE", 0, "Write the results as JSON", 1)
#define BENCH_OPTIONS_TRAFFIC(tokens, hidden, experts)                                                       \
  BENCH_ROW("tokens", KEY_TOKENS, "N", 0, tokens, 2), BENCH_ROW("hidden", KEY_HIDDEN, "N", 0, hidden, 2),    \
      BENCH_ROW("topk", KEY_TOPK, "K", 0, "Experts of a token (8)", 2),                                      \
      BENCH_ROW("experts", KEY_EXPERTS, "E", 0, experts, 2),                                                 \
      BENCH_ROW("skew", KEY_SKEW, "RATIO", 0,                                                                \
                "Made-up traffic with this imbalance, as ultraep_plan --zipf (4)", 2),                       \
      BENCH_ROW("trace", KEY_TRACE, "FILE", 0, "Traffic of a load trace", 2),                                \
      BENCH_ROW("routing", KEY_ROUTING, "FILE", 0, "Traffic of a routing trace", 2),                         \
      BENCH_ROW("layer", KEY_LAYER, "N", 0, "Only records of this layer", 2),                                \
      BENCH_ROW("limit", KEY_LIMIT, "N", 0, "Only the first N records", 2),                                  \
      BENCH_ROW("seed", KEY_SEED, "N", 0,                                                                    \
                "Seed of made-up traffic and of the order of a record's tokens (1)", 2)
#define BENCH_OPTIONS_GROUP                                                                                  \
  BENCH_ROW("slots", KEY_SLOTS, "S", 0, "Replica slots on each rank (2)", 3),                                \
      BENCH_ROW("align", KEY_ALIGN, "ROWS", 0, "Segments start at multiples of this (1)", 3),                \
      BENCH_ROW("domain", KEY_DOMAIN, "D", 0, "Replicas stay among D consecutive ranks (all)", 3),           \
      BENCH_ROW("tolerance", KEY_TOLERANCE, "X", 0, "Balance to mean * (1 + X) and no further (0)", 3),      \
      BENCH_ROW("replica-rows", KEY_REPLICA_ROWS, "N", 0,                                                    \
                "What a replica costs its rank besides its rows, in rows, for plans (0)", 3),                \
      BENCH_ROW("mode", KEY_MODE, "auto|direct|once", 0,                                                     \
                "Dispatch: every row straight to its place, or once a rank (auto)", 3),                      \
      BENCH_ROW("combine", KEY_COMBINE, "exact|partial", 0,                                                  \
                "Combine: from single rows, or from sums made at each rank (exact)", 3),                     \
      BENCH_ROW("timeout", KEY_TIMEOUT, "MS", 0, "How long a rank waits for another (30000)", 3),            \
      BENCH_ROW("ctas", KEY_CTAS, "N", 0, "Most SMs a rank's kernel uses, 0: the library's choice (0)", 4)

/* The defaults of ultraep_perf. */
benchOptions_t benchOptionsDefault(void);
/* Takes one option: 0, -1 and a message, or 1 where the key is none of these. */
int benchOptionApply(int key, const char *text, benchOptions_t *options, perfError_t *error);
/* Sets what was left out and refuses what does not go together. */
int benchOptionsFinish(benchOptions_t *options, perfError_t *error);

#endif
