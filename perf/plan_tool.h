/* ultraep_plan: plans load matrices and says how good the plans are. */
#ifndef ULTRAEP_PERF_PLAN_TOOL_H_
#define ULTRAEP_PERF_PLAN_TOOL_H_

#include "gate.h"
#include "options.h"
#include "ultraep_balancer.h"

#include <stdio.h>

typedef enum { PLAN_CHART_AUTO, PLAN_CHART_ALWAYS, PLAN_CHART_NEVER } planChart_t;

typedef enum { PLAN_GATE_OFF, PLAN_GATE_DIRECT, PLAN_GATE_RELAY } planGate_t;
enum { PLAN_MAX_LINKS = 8 };

typedef struct {
  const char *tracePath; /* null: zipf */
  int32_t nRanks, nSlots, nDomainRanks;
  double tolerance;
  int32_t replicaRows;
  /* what rows and copies cost */
  int32_t gate; /* planGate_t; its link is the first */
  bool cost;    /* print the critical path of the copies, for each link */
  int32_t nLinks;
  double linkGbps[PLAN_MAX_LINKS]; /* of a rank, in each direction */
  int64_t expertBytes, tileBytes;
  double rowNs, tflops; /* rowNs 0: one flop a byte of the expert, at tflops */
  double hopUs;
  /* zipf */
  double zipfRatio; /* 0: not asked for */
  int32_t nExperts, topK, nTokens, nRecords;
  int64_t seed;
  /* filters on a trace; layer -1: all, limit 0: all */
  int64_t layer, limit;
  int32_t repeat;
  const char *jsonPath; /* null: none, "-": stdout */
  int32_t chart;        /* planChart_t */
} planOptions_t;

/* Of one plan: what the gate weighed, and for each link how long the weights take. */
typedef struct {
  gateFigures_t gate;
  ultraepCopies_t direct[PLAN_MAX_LINKS], relay[PLAN_MAX_LINKS];
} planCost_t;

/* What is said of one record. Imbalances are max / mean over ranks. */
typedef struct {
  int64_t step, layer, microbatch;
  double before, planned, realised, bound;
  double gap;    /* planned max / bound - 1 */
  double local;  /* share of the assignments whose instance is on their source's rank */
  double planUs; /* median over the repeats */
  int64_t replicas, fanout, rankIn;
  planCost_t cost;
} planFigures_t;

/* Means and maxima over records, us. */
typedef struct {
  int64_t nRecords, kept, all; /* replicas with and without the gate */
  double direct[PLAN_MAX_LINKS], relay[PLAN_MAX_LINKS];
  double worstDirect[PLAN_MAX_LINKS], worstRelay[PLAN_MAX_LINKS], worstRatio[PLAN_MAX_LINKS];
} planCostSums_t;

/* Reads the options or exits with PERF_EXIT_USAGE. */
void planOptionsParse(planOptions_t *options, int argc, char **argv);

/* ---- plan_cost.c ---- */
/* The planner's rates where the gate is on, else 0. */
void planCostRates(const planOptions_t *options, ultraepPlannerConfig_t *config);
/* Null, or which option makes a rate that the planner does not take. */
const char *planCostFault(const planOptions_t *options);
/* Sets direct and relay; source has room for one number a replica. */
int planCostCopies(const planOptions_t *options, const ultraepPlan_t *plan, int32_t *source, planCost_t *cost,
                   perfError_t *error);
void planCostAdd(const planOptions_t *options, const planCost_t *cost, planCostSums_t *sums);
void planCostHeaderPrint(const planOptions_t *options);
void planCostPrint(const planOptions_t *options, const planCost_t *cost);
void planCostSumsPrint(const planOptions_t *options, const planCostSums_t *sums);
/* The copies as an array, one object a link; null without memory. */
json_t *planCostJson(const planOptions_t *options, const planCost_t *cost);
json_t *planCostSumsJson(const planOptions_t *options, const planCostSums_t *sums);

typedef struct planReport planReport_t;

/* Where the figures go: a table on stdout, JSON lines, a chart. */
int planReportOpen(planReport_t **report, const planOptions_t *options, perfError_t *error);
int planReportRecord(planReport_t *report, const planFigures_t *figures, const ultraepPlan_t *plan,
                     const int64_t *realised, perfError_t *error);
/* Prints the summary and closes; fails where anything could not be written. */
int planReportFinish(planReport_t *report, perfError_t *error);
void planReportDestroy(planReport_t *report);

#endif
