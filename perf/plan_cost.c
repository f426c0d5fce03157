/* What rows and copies cost: the gate's rates, and the critical path of the weights. */
#include "plan_tool.h"

#include <stdio.h>

#define US_PER_PS 1e-6

static double cost_row_ps(const planOptions_t *options) {
  return options->rowNs > 0 ? options->rowNs * 1e3 : (double)options->expertBytes / options->tflops;
}

/* Picoseconds for so many bytes over link number i: bytes / (GB/s) are nanoseconds. */
static double cost_link_ps(const planOptions_t *options, int32_t i, int64_t bytes) {
  return 1e3 * (double)bytes / options->linkGbps[i];
}

const char *planCostFault(const planOptions_t *options) {
  if (options->gate != PLAN_GATE_OFF && cost_row_ps(options) > ULTRAEP_MAX_ROW_PS)
    return "--row-ns, or --expert-bytes over --tflops: more than 4.19 us a row";
  if (options->tileBytes > options->expertBytes) return "--tile is more than --expert-bytes";
  for (int32_t i = 0; i < options->nLinks; i++)
    if (cost_link_ps(options, i, options->expertBytes) > (double)ULTRAEP_MAX_COPY_PS)
      return "--expert-bytes over --link: more than one second a copy";
  return NULL;
}

void planCostRates(const planOptions_t *options, ultraepPlannerConfig_t *config) {
  if (options->gate == PLAN_GATE_OFF) return;
  /* At least one picosecond: 0 would switch the gate off. */
  config->rowPs = (uint32_t)(cost_row_ps(options) + 0.5);
  config->copyPs = (uint64_t)(cost_link_ps(options, 0, options->expertBytes) + 0.5);
  if (config->copyPs == 0) config->copyPs = 1;
  config->relayCopies = options->gate == PLAN_GATE_RELAY;
}

int planCostCopies(const planOptions_t *options, const ultraepPlan_t *plan, int32_t *source, planCost_t *cost,
                   perfError_t *error) {
  ultraepResult_t result = ultraepPlanRelay(plan, source);
  for (int32_t i = 0; i < options->nLinks && result == ultraepSuccess; i++) {
    ultraepLink_t link = {.copyPs = (uint64_t)(cost_link_ps(options, i, options->expertBytes) + 0.5),
                          .tilePs = (uint64_t)(cost_link_ps(options, i, options->tileBytes) + 0.5),
                          .hopPs = (uint64_t)(options->hopUs * 1e6 + 0.5)};
    result = ultraepPlanCopies(plan, NULL, &link, &cost->direct[i]);
    if (result == ultraepSuccess) result = ultraepPlanCopies(plan, source, &link, &cost->relay[i]);
  }
  return result == ultraepSuccess ? 0 : perfErrorSet(error, "the model refuses the plan");
}

/* ---- over records ---- */

static double cost_ratio(double relay, double direct) {
  return direct > 0 ? relay / direct : 0;
}

void planCostAdd(const planOptions_t *options, const planCost_t *cost, planCostSums_t *sums) {
  sums->nRecords++;
  sums->kept += cost->gate.kept;
  sums->all += cost->gate.all;
  for (int32_t i = 0; i < options->nLinks; i++) {
    double direct = US_PER_PS * (double)cost->direct[i].ps, relay = US_PER_PS * (double)cost->relay[i].ps;
    double ratio = cost_ratio(relay, direct);
    sums->direct[i] += direct;
    sums->relay[i] += relay;
    if (direct > sums->worstDirect[i]) sums->worstDirect[i] = direct;
    if (relay > sums->worstRelay[i]) sums->worstRelay[i] = relay;
    if (ratio > sums->worstRatio[i]) sums->worstRatio[i] = ratio;
  }
}

/* ---- text ---- */

void planCostHeaderPrint(const planOptions_t *options) {
  if (options->gate != PLAN_GATE_OFF) {
    ultraepPlannerConfig_t config = {0};
    planCostRates(options, &config);
    printf("# cost gate: %g ns a row, %g us a copy of %.2f MB, %s\n", 1e-3 * config.rowPs,
           US_PER_PS * (double)config.copyPs, 1e-6 * (double)options->expertBytes,
           config.relayCopies ? "replicas relay" : "masters send every copy");
  }
  if (!options->cost) return;
  printf(
      "# copies: %.2f MB an expert, tiles of %lld bytes, %g us from a tile's arrival to its use; links are "
      "full-duplex and\n#   shared fairly, all copies start at once; launches, what SMs and memory can do, "
      "and other traffic are left out\n",
      1e-6 * (double)options->expertBytes, (long long)options->tileBytes, options->hopUs);
}

void planCostPrint(const planOptions_t *options, const planCost_t *cost) {
  char text[512];
  if (options->gate != PLAN_GATE_OFF) {
    gateText(&cost->gate, text, sizeof(text));
    printf("#   gate: %s\n", text);
  }
  for (int32_t i = 0; options->cost && i < options->nLinks; i++) {
    const ultraepCopies_t *direct = &cost->direct[i], *relay = &cost->relay[i];
    printf(
        "#   %g GB/s, a copy %.1f us: direct %.1f us (rank %d sends %d, rank %d receives %d); relay %.1f us "
        "(rank %d sends %d, rank %d receives %d, depth %d, busiest link alone %.1f us), %.3f of direct\n",
        options->linkGbps[i], 1e-6 * cost_link_ps(options, i, options->expertBytes),
        US_PER_PS * (double)direct->ps, direct->sender, direct->maxSends, direct->receiver,
        direct->maxReceives, US_PER_PS * (double)relay->ps, relay->sender, relay->maxSends, relay->receiver,
        relay->maxReceives, relay->depth, US_PER_PS * (double)relay->floorPs,
        cost_ratio((double)relay->ps, (double)direct->ps));
  }
}

void planCostSumsPrint(const planOptions_t *options, const planCostSums_t *sums) {
  double count = (double)sums->nRecords;
  if (options->gate != PLAN_GATE_OFF)
    printf("# gate: kept %lld of %lld replicas\n", (long long)sums->kept, (long long)sums->all);
  for (int32_t i = 0; options->cost && i < options->nLinks; i++)
    printf(
        "# copies at %g GB/s: direct %.1f us (worst %.1f), relay %.1f us (worst %.1f), %.3f of direct (worst "
        "%.3f)\n",
        options->linkGbps[i], sums->direct[i] / count, sums->worstDirect[i], sums->relay[i] / count,
        sums->worstRelay[i], cost_ratio(sums->relay[i], sums->direct[i]), sums->worstRatio[i]);
}

/* ---- JSON ---- */

static json_t *cost_copies_json(const ultraepCopies_t *copies) {
  return json_pack("{s:f,s:f,s:i,s:i,s:i,s:i,s:i}", "us", US_PER_PS * (double)copies->ps, "floor_us",
                   US_PER_PS * (double)copies->floorPs, "sends", (int)copies->maxSends, "sender",
                   (int)copies->sender, "receives", (int)copies->maxReceives, "receiver",
                   (int)copies->receiver, "depth", (int)copies->depth);
}

json_t *planCostJson(const planOptions_t *options, const planCost_t *cost) {
  json_t *array = json_array();
  for (int32_t i = 0; i < options->nLinks; i++)
    json_array_append_new(array, json_pack("{s:f,s:f,s:o,s:o}", "gbps", options->linkGbps[i], "copy_us",
                                           1e-6 * cost_link_ps(options, i, options->expertBytes), "direct",
                                           cost_copies_json(&cost->direct[i]), "relay",
                                           cost_copies_json(&cost->relay[i])));
  return array;
}

json_t *planCostSumsJson(const planOptions_t *options, const planCostSums_t *sums) {
  json_t *array = json_array();
  double count = (double)sums->nRecords;
  for (int32_t i = 0; i < options->nLinks; i++)
    json_array_append_new(array,
                          json_pack("{s:f,s:f,s:f,s:f,s:f,s:f}", "gbps", options->linkGbps[i], "direct_us",
                                    sums->direct[i] / count, "relay_us", sums->relay[i] / count,
                                    "worst_direct_us", sums->worstDirect[i], "worst_relay_us",
                                    sums->worstRelay[i], "worst_ratio", sums->worstRatio[i]));
  return array;
}
