/* ultraep_links without GPUs: as many made-up ones as LINKS_FAKE_GPUS says, with rates that a test can know.
 * LINKS_FAKE_FAULT=unreachable: the first and the last cannot use each other's memory; =bulk: no bulk copies;
 * =flags: no answer. */
#include "links.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool fake_fault_is(const char *name) {
  const char *fault = getenv("LINKS_FAKE_FAULT");
  return fault != NULL && strcmp(fault, name) == 0;
}

int linksFind(const linksOptions_t *options, linksFigures_t *figures, perfError_t *error) {
  const char *text = getenv("LINKS_FAKE_GPUS");
  int32_t count = text == NULL ? 0 : (int32_t)strtol(text, NULL, 10);
  if (count == 0) return perfErrorSet(error, "no CUDA device can be used: there is none");
  figures->nGpus = options->nGpus > 0 && options->nGpus < count ? options->nGpus : count;
  figures->driver = figures->runtime = 13000;
  for (int32_t i = 0; i < figures->nGpus; i++) {
    snprintf(figures->gpus[i].name, sizeof(figures->gpus[i].name), "Fake %d", i);
    snprintf(figures->gpus[i].uuid, sizeof(figures->gpus[i].uuid), "GPU-%d", i);
    figures->gpus[i].sms = 132;
    figures->gpus[i].major = 9;
  }
  return 0;
}

/* From GPU f to t at 400 + 10 f + t GB/s, within one at 4000; kernels as `rates` says, with both directions
 * at once at three quarters. */
static void fake_pair_set(const linksOptions_t *options, int32_t nGpus, int32_t from, int32_t to,
                          linksPair_t *pair) {
  static const double rates[LINKS_WAYS] = {10e9, 11e9, 9e9, 8e9}; /* a block */
  pair->copy = from == to ? 4000e9 : (400.0 + 10 * from + to) * 1e9;
  pair->both = from == to ? 0 : 0.75 * pair->copy;
  if (!pair->reachable) return;
  for (linksWay_t way = 0; way < LINKS_WAYS; way++) {
    if (from == to && way > LINKS_STORE_BULK) continue;
    if (fake_fault_is("bulk") && (way == LINKS_STORE_BULK || way == LINKS_LOAD_BULK)) continue;
    for (int32_t i = 0; i < options->nBudgets; i++) {
      pair->kernel[way][i] = rates[way] * options->budgets[i];
      if (from != to && linksKernelBoth(nGpus, from, to))
        pair->kernelBoth[way][i] = 0.75 * pair->kernel[way][i];
    }
  }
  pair->flagUs = from == to ? 0 : 2.5;
}

int linksMeasure(const linksOptions_t *options, linksFigures_t *figures, perfError_t *error) {
  int32_t last = figures->nGpus - 1;
  if (fake_fault_is("flags")) return perfErrorSet(error, "flags between GPUs 0 and 1: no answer within 5 s");
  for (int32_t from = 0; from <= last; from++) {
    for (int32_t to = 0; to <= last; to++) {
      linksPair_t *pair = &figures->pairs[from][to];
      pair->reachable = !fake_fault_is("unreachable") || from == to || from + to != last;
      fake_pair_set(options, figures->nGpus, from, to, pair);
    }
  }
  return 0;
}
