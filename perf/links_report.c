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

/* ---- what is measured ---- */

enum { KERNEL_ROUNDS = 3 };

int32_t linksKernelRounds(const linksOptions_t *options, int32_t nGpus) {
  return nGpus > 2 && options->rounds > KERNEL_ROUNDS ? KERNEL_ROUNDS : options->rounds;
}

/* Of more than two GPUs, neighbours in a ring. */
bool linksKernelBoth(int32_t nGpus, int32_t from, int32_t to) {
  return (from + 1) % nGpus == to || (to + 1) % nGpus == from;
}

/* ---- summaries over the pairs ---- */

/* What a copy by a kernel depends on. */
typedef struct {
  linksWay_t way;
  int32_t budget;
} linksKernel_t;
typedef double (*linksValue_t)(const linksPair_t *pair, linksKernel_t kernel);

static double links_copy(const linksPair_t *pair, linksKernel_t kernel) {
  (void)kernel;
  return pair->copy / 1e9;
}
static double links_both(const linksPair_t *pair, linksKernel_t kernel) {
  (void)kernel;
  return pair->both / 1e9;
}
static double links_flag(const linksPair_t *pair, linksKernel_t kernel) {
  (void)kernel;
  return pair->flagUs;
}
static double links_kernel(const linksPair_t *pair, linksKernel_t kernel) {
  return pair->kernel[kernel.way][kernel.budget] / 1e9;
}
static double links_kernel_both(const linksPair_t *pair, linksKernel_t kernel) {
  return pair->kernelBoth[kernel.way][kernel.budget] / 1e9;
}
static const linksKernel_t links_none = {0};

typedef struct {
  int32_t count;
  double least, median, most;
} linksSummary_t;

/* Of what was measured: between different GPUs, or within each. */
static linksSummary_t links_summary(const linksFigures_t *figures, bool within, linksValue_t value,
                                    linksKernel_t kernel) {
  double values[LINKS_MAX_GPUS * LINKS_MAX_GPUS];
  linksSummary_t summary = {0};
  for (int32_t from = 0; from < figures->nGpus; from++) {
    for (int32_t to = 0; to < figures->nGpus; to++) {
      double one = value(&figures->pairs[from][to], kernel);
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
      double one = value(&figures->pairs[from][to], links_none);
      if (one > 0) {
        printf(" %8.*f", decimals, one);
      } else {
        printf(" %8s", "-");
      }
    }
    printf("\n");
  }
}

static void links_median_print(const linksFigures_t *figures, bool within, linksValue_t value, linksWay_t way,
                               int32_t budget) {
  linksSummary_t summary = links_summary(figures, within, value, (linksKernel_t){way, budget});
  if (summary.count == 0) {
    printf(" %8s", "-");
  } else {
    printf(" %8.1f", summary.median);
  }
}

static void links_budgets_print(const linksOptions_t *options, const linksFigures_t *figures) {
  printf(
      "#\n# copies by a kernel, one direction, GB/s, medians: within a GPU (read and written), to another by "
      "stores, from another by loads; plain and bulk\n");
  printf("# %8s %8s %8s %8s %8s %8s %8s\n", "blocks", "within", "bulk", "stores", "bulk", "loads", "bulk");
  for (int32_t i = 0; i < options->nBudgets; i++) {
    printf("%10d", options->budgets[i]);
    for (linksWay_t way = LINKS_STORE; way <= LINKS_STORE_BULK; way++)
      links_median_print(figures, true, links_kernel, way, i);
    for (linksWay_t way = 0; way < LINKS_WAYS; way++)
      links_median_print(figures, false, links_kernel, way, i);
    printf("\n");
  }
}

static void links_budgets_both_print(const linksOptions_t *options, const linksFigures_t *figures) {
  printf("#\n# copies by a kernel, both directions at once, GB/s of each, medians%s\n",
         figures->nGpus > 2 ? ": between neighbours" : "");
  printf("# %8s %8s %8s %8s %8s\n", "blocks", "stores", "bulk", "loads", "bulk");
  for (int32_t i = 0; i < options->nBudgets; i++) {
    printf("%10d", options->budgets[i]);
    for (linksWay_t way = 0; way < LINKS_WAYS; way++)
      links_median_print(figures, false, links_kernel_both, way, i);
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
  linksSummary_t link = links_summary(figures, false, links_copy, links_none);
  printf("# ultraep_links version %d.%d.%d\n", ULTRAEP_VERSION_MAJOR, ULTRAEP_VERSION_MINOR,
         ULTRAEP_VERSION_PATCH);
  for (int32_t i = 0; i < figures->nGpus; i++)
    printf("# GPU %d: %s, %d SMs\n", i, figures->gpus[i].name, figures->gpus[i].sms);
  printf("# CUDA: driver %d.%d, runtime %d.%d; copies of %lld bytes, medians of %d, by a kernel of %d\n",
         figures->driver / 1000, figures->driver % 1000 / 10, figures->runtime / 1000,
         figures->runtime % 1000 / 10, (long long)options->bytes, options->rounds,
         linksKernelRounds(options, figures->nGpus));
  links_matrix_print(figures, "copies by the copy engines, GB/s; within a GPU bytes read and written",
                     links_copy, 1);
  if (figures->nGpus > 1) {
    links_matrix_print(figures, "the same with both directions at once, GB/s of each", links_both, 1);
    links_matrix_print(figures, "flags, there and back, us", links_flag, 2);
  }
  links_budgets_print(options, figures);
  if (figures->nGpus > 1) links_budgets_both_print(options, figures);
  links_unreachable_print(figures);
  printf("#\n# copy rate within a GPU: %.1f GB/s read and written, median of %d\n",
         links_summary(figures, true, links_copy, links_none).median, figures->nGpus);
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

/* A rate for each number of blocks. */
static json_t *links_json_budgets(const linksOptions_t *options, const linksPair_t *pair, linksValue_t value,
                                  linksWay_t way) {
  json_t *rates = json_array();
  for (int32_t i = 0; i < options->nBudgets; i++)
    json_array_append_new(rates, links_json_number(value(pair, (linksKernel_t){way, i})));
  return rates;
}

static json_t *links_json_pair(const linksOptions_t *options, const linksFigures_t *figures, int32_t from,
                               int32_t to) {
  static const char *const keys[LINKS_WAYS] = {"store_gbps", "store_bulk_gbps", "load_gbps",
                                               "load_bulk_gbps"};
  static const char *const bothKeys[LINKS_WAYS] = {"both_store_gbps", "both_store_bulk_gbps",
                                                   "both_load_gbps", "both_load_bulk_gbps"};
  const linksPair_t *pair = &figures->pairs[from][to];
  json_t *object =
      json_pack("{s:i,s:i,s:b,s:o,s:o,s:o}", "from", (int)from, "to", (int)to, "reachable",
                (int)pair->reachable, "copy_gbps", links_json_number(links_copy(pair, links_none)),
                "both_gbps", links_json_number(links_both(pair, links_none)), "flag_us",
                links_json_number(links_flag(pair, links_none)));
  for (linksWay_t way = 0; way < LINKS_WAYS; way++) {
    json_object_set_new(object, keys[way], links_json_budgets(options, pair, links_kernel, way));
    json_object_set_new(object, bothKeys[way], links_json_budgets(options, pair, links_kernel_both, way));
  }
  return object;
}

static json_t *links_json_gpu(const linksGpu_t *gpu) {
  char capability[32];
  snprintf(capability, sizeof(capability), "%d.%d", gpu->major, gpu->minor);
  return json_pack("{s:s,s:s,s:i,s:s}", "name", gpu->name, "uuid", gpu->uuid, "sms", (int)gpu->sms,
                   "compute_capability", capability);
}

static json_t *links_json_make(const linksOptions_t *options, const linksFigures_t *figures) {
  json_t *gpus = json_array(), *pairs = json_array(), *budgets = json_array();
  for (int32_t i = 0; i < figures->nGpus; i++) json_array_append_new(gpus, links_json_gpu(&figures->gpus[i]));
  for (int32_t i = 0; i < options->nBudgets; i++)
    json_array_append_new(budgets, json_integer(options->budgets[i]));
  for (int32_t from = 0; from < figures->nGpus; from++) {
    for (int32_t to = 0; to < figures->nGpus; to++)
      json_array_append_new(pairs, links_json_pair(options, figures, from, to));
  }
  return json_pack("{s:i,s:o,s:i,s:i,s:I,s:i,s:i,s:i,s:o,s:o,s:o,s:o}", "version", 1, "gpus", gpus, "driver",
                   (int)figures->driver, "runtime", (int)figures->runtime, "bytes",
                   (json_int_t)options->bytes, "iterations", (int)options->rounds, "kernel_iterations",
                   (int)linksKernelRounds(options, figures->nGpus), "round_trips", (int)options->trips,
                   "blocks", budgets, "pairs", pairs, "copy_gbps",
                   links_json_number(links_summary(figures, true, links_copy, links_none).median),
                   "link_gbps",
                   links_json_number(links_summary(figures, false, links_copy, links_none).median));
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
