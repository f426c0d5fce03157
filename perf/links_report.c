#include "links.h"

#include "ultraep.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void linksList(const linksFigures_t *figures) {
  for (int32_t i = 0; i < figures->nGpus; i++)
    printf("GPU %d: %s (UUID: %s)\n", i, figures->gpus[i].name, figures->gpus[i].uuid);
}

/* ---- summaries over the pairs ---- */

typedef double (*linksValue_t)(const linksPair_t *pair, int32_t budget);

static double links_copy(const linksPair_t *pair, int32_t budget) {
  (void)budget;
  return pair->copy / 1e9;
}
static double links_both(const linksPair_t *pair, int32_t budget) {
  (void)budget;
  return pair->both / 1e9;
}
static double links_flag(const linksPair_t *pair, int32_t budget) {
  (void)budget;
  return pair->flagUs;
}
static double links_store(const linksPair_t *pair, int32_t budget) {
  return pair->store[budget] / 1e9;
}
static double links_load(const linksPair_t *pair, int32_t budget) {
  return pair->load[budget] / 1e9;
}

typedef struct {
  int32_t count;
  double least, median, most;
} linksSummary_t;

/* Of what was measured: between different GPUs, or within each. */
static linksSummary_t links_summary(const linksFigures_t *figures, bool within, linksValue_t value,
                                    int32_t budget) {
  double values[LINKS_MAX_GPUS * LINKS_MAX_GPUS];
  linksSummary_t summary = {0};
  for (int32_t from = 0; from < figures->nGpus; from++) {
    for (int32_t to = 0; to < figures->nGpus; to++) {
      double one = value(&figures->pairs[from][to], budget);
      if ((from == to) == within && one > 0) values[summary.count++] = one;
    }
  }
  if (summary.count == 0) return summary;
  summary.median = perfMedian(values, summary.count); /* sorts them */
  summary.least = values[0];
  summary.most = values[summary.count - 1];
  return summary;
}

/* ---- tables ---- */

static void links_matrix_print(const linksFigures_t *figures, const char *title, linksValue_t value,
                               int decimals) {
  printf("#\n# %s\n#%9s", title, "from, to");
  for (int32_t to = 0; to < figures->nGpus; to++) printf(" %8d", to);
  printf("\n");
  for (int32_t from = 0; from < figures->nGpus; from++) {
    printf("%10d", from);
    for (int32_t to = 0; to < figures->nGpus; to++) {
      double one = value(&figures->pairs[from][to], 0);
      if (one > 0) {
        printf(" %8.*f", decimals, one);
      } else {
        printf(" %8s", "-");
      }
    }
    printf("\n");
  }
}

static void links_summary_print(linksSummary_t summary) {
  if (summary.count == 0) {
    printf(" %8s %8s %8s", "-", "-", "-");
  } else {
    printf(" %8.1f %8.1f %8.1f", summary.least, summary.median, summary.most);
  }
}

static void links_budgets_print(const linksOptions_t *options, const linksFigures_t *figures) {
  printf("#\n# copies by a kernel, GB/s: within a GPU (read and written), to another by stores, from another "
         "by loads; least, median, most\n");
  printf("# %8s %8s %8s %8s %8s %8s %8s %8s %8s %8s\n", "blocks", "within", "", "", "stores", "", "", "loads",
         "", "");
  for (int32_t i = 0; i < options->nBudgets; i++) {
    printf("%10d", options->budgets[i]);
    links_summary_print(links_summary(figures, true, links_store, i));
    links_summary_print(links_summary(figures, false, links_store, i));
    links_summary_print(links_summary(figures, false, links_load, i));
    printf("\n");
  }
}

static void links_unreachable_print(const linksFigures_t *figures) {
  for (int32_t from = 0; from < figures->nGpus; from++) {
    for (int32_t to = from + 1; to < figures->nGpus; to++)
      if (!figures->pairs[from][to].reachable)
        printf("# GPUs %d and %d: kernels cannot use each other's memory\n", from, to);
  }
}

static void links_tables_print(const linksOptions_t *options, const linksFigures_t *figures) {
  linksSummary_t link = links_summary(figures, false, links_copy, 0);
  printf("# ultraep_links version %d.%d.%d\n", ULTRAEP_VERSION_MAJOR, ULTRAEP_VERSION_MINOR,
         ULTRAEP_VERSION_PATCH);
  for (int32_t i = 0; i < figures->nGpus; i++)
    printf("# GPU %d: %s, %d SMs\n", i, figures->gpus[i].name, figures->gpus[i].sms);
  printf("# CUDA: driver %d.%d, runtime %d.%d; copies of %lld bytes, medians of %d\n", figures->driver / 1000,
         figures->driver % 1000 / 10, figures->runtime / 1000, figures->runtime % 1000 / 10,
         (long long)options->bytes, options->rounds);
  links_matrix_print(figures, "copies by the copy engines, GB/s; within a GPU bytes read and written",
                     links_copy, 1);
  if (figures->nGpus > 1) {
    links_matrix_print(figures, "the same with both directions at once, GB/s of each", links_both, 1);
    links_matrix_print(figures, "flags, there and back, us", links_flag, 2);
  }
  links_budgets_print(options, figures);
  links_unreachable_print(figures);
  printf("#\n# copy rate within a GPU: %.1f GB/s read and written, median of %d\n",
         links_summary(figures, true, links_copy, 0).median, figures->nGpus);
  if (link.count == 0) {
    printf("# link rate: none, one GPU has no pairs\n");
  } else {
    printf("# link rate: %.1f GB/s, median of %d pairs and directions (least %.1f, most %.1f)\n", link.median,
           link.count, link.least, link.most);
  }
}

/* ---- JSON ---- */

/* A figure, null where it was not measured. */
static json_t *links_json_number(double value) {
  return value > 0 ? json_real(value) : json_null();
}

static json_t *links_json_budgets(const linksOptions_t *options, const linksPair_t *pair,
                                  linksValue_t value) {
  json_t *rates = json_array();
  for (int32_t i = 0; i < options->nBudgets; i++)
    json_array_append_new(rates, links_json_number(value(pair, i)));
  return rates;
}

static json_t *links_json_pair(const linksOptions_t *options, const linksFigures_t *figures, int32_t from,
                               int32_t to) {
  const linksPair_t *pair = &figures->pairs[from][to];
  return json_pack("{s:i,s:i,s:b,s:o,s:o,s:o,s:o,s:o}", "from", (int)from, "to", (int)to, "reachable",
                   (int)pair->reachable, "copy_gbps", links_json_number(links_copy(pair, 0)), "both_gbps",
                   links_json_number(links_both(pair, 0)), "store_gbps",
                   links_json_budgets(options, pair, links_store), "load_gbps",
                   links_json_budgets(options, pair, links_load), "flag_us",
                   links_json_number(links_flag(pair, 0)));
}

static json_t *links_json_make(const linksOptions_t *options, const linksFigures_t *figures) {
  json_t *gpus = json_array(), *pairs = json_array(), *budgets = json_array();
  for (int32_t i = 0; i < figures->nGpus; i++)
    json_array_append_new(gpus, json_pack("{s:s,s:s,s:i}", "name", figures->gpus[i].name, "uuid",
                                          figures->gpus[i].uuid, "sms", (int)figures->gpus[i].sms));
  for (int32_t i = 0; i < options->nBudgets; i++)
    json_array_append_new(budgets, json_integer(options->budgets[i]));
  for (int32_t from = 0; from < figures->nGpus; from++) {
    for (int32_t to = 0; to < figures->nGpus; to++)
      json_array_append_new(pairs, links_json_pair(options, figures, from, to));
  }
  return json_pack("{s:i,s:o,s:i,s:i,s:I,s:i,s:i,s:o,s:o,s:o,s:o}", "version", 1, "gpus", gpus, "driver",
                   (int)figures->driver, "runtime", (int)figures->runtime, "bytes",
                   (json_int_t)options->bytes, "iterations", (int)options->rounds, "round_trips",
                   (int)options->trips, "blocks", budgets, "pairs", pairs, "copy_gbps",
                   links_json_number(links_summary(figures, true, links_copy, 0).median), "link_gbps",
                   links_json_number(links_summary(figures, false, links_copy, 0).median));
}

static int links_json_write(const linksOptions_t *options, const linksFigures_t *figures,
                            perfError_t *error) {
  json_t *document = links_json_make(options, figures);
  if (document == NULL) return perfErrorSet(error, "no memory for the JSON document");
  int status = json_dump_file(document, options->jsonPath, JSON_INDENT(1) | JSON_REAL_PRECISION(10));
  json_decref(document);
  if (status == 0) return 0;
  return perfErrorSet(error, "%s: cannot be written: %s", options->jsonPath, strerror(errno));
}

int linksReport(const linksOptions_t *options, const linksFigures_t *figures, perfError_t *error) {
  links_tables_print(options, figures);
  if (fflush(stdout) != 0 || ferror(stdout)) return perfErrorSet(error, "stdout: cannot be written");
  return options->jsonPath == NULL ? 0 : links_json_write(options, figures, error);
}
