#include "links.h"

#include <argp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { KEY_BYTES = 0x100, KEY_CTAS, KEY_FLAGS, KEY_LIST };

static const char linksDoc[] =
    "Measures the GPUs of this machine: how fast each copies within its memory and to every other, and how "
    "long a flag takes there and back.\v"
    "All times are taken on the GPUs, all rates are medians of single copies, in GB/s (1e9 bytes). Within a "
    "GPU bytes read and bytes written both count, between two GPUs each byte once. Copies by the copy "
    "engines are "
    "cudaMemcpyPeerAsync's; the second table has one in each direction at once. Copies by a kernel take as "
    "many "
    "thread blocks, one an SM, as --ctas says: stores, a kernel of the sender writes to the receiver's "
    "memory; "
    "loads, a kernel of the receiver reads from the sender's. Plain, 1024 threads a block load and store 16 "
    "bytes at a "
    "time; bulk, two threads keep cp.async.bulk copies of 16 KiB through shared memory under way, up to 12 "
    "in a "
    "block, on devices from sm_90 on. One table has one direction, one both at once, each GPU's kernel at "
    "the "
    "same time. All that a copy brought is compared with its source, untimed. Flags: a thread on each GPU "
    "waits "
    "for a word in its own memory and answers into the other's.\n\n"
    "With more than 2 GPUs copies by a kernel are timed 3 times at most, and both directions at once are "
    "only measured "
    "between neighbours: GPUs 0 and 1, 1 and 2, ..., the last and 0.\n\n"
    "The link rate in the last line is the median, over all pairs and both directions, of what the copy "
    "engines copy one way; perf/sweep measures against it.\n\n"
    "The JSON document has every pair by itself, from and to: copy_gbps and both_gbps of the copy engines, "
    "flag_us, "
    "and of kernels store_gbps, store_bulk_gbps, load_gbps and load_bulk_gbps, and with both directions at "
    "once "
    "both_store_gbps, both_store_bulk_gbps, both_load_gbps and both_load_bulk_gbps, each a list in the order "
    "of "
    "blocks. What was not measured is null, in the tables -. Within a GPU store_gbps and store_bulk_gbps are "
    "its "
    "kernels' copies. iterations and kernel_iterations are how many copies a median is of.\n\n"
    "Exit status: 0; 1 where no GPU can be used or something fails; 2 where the options are at fault.";

static const struct argp_option linksOptionTable[] = {
    {"gpus", 'g', "N", 0, "Only the first N GPUs (all)", 1},
    {"bytes", KEY_BYTES, "BYTES", 0, "Of one copy, K M G allowed (256M)", 1},
    {"iters", 'n', "N", 0, "Timed copies of each kind (10); by a kernel at most 3 with more than 2 GPUs", 1},
    {"ctas", KEY_CTAS, "LIST", 0, "Thread blocks of a kernel's copies (4,8,16,24,32)", 1},
    {"flags", KEY_FLAGS, "N", 0, "Round trips of the flags (1000)", 1},
    {"list", KEY_LIST, NULL, 0, "Only list the GPUs, as nvidia-smi -L does", 1},
    {"json", 'J', "FILE", 0, "Write the figures as JSON", 1},
    {0}};

static int links_budgets_parse(const char *text, linksOptions_t *options, perfError_t *error) {
  char copy[256], *rest = copy, *one;
  if (snprintf(copy, sizeof(copy), "%s", text) >= (int)sizeof(copy))
    return perfErrorSet(error, "--ctas: too long");
  options->nBudgets = 0;
  while ((one = strsep(&rest, ",")) != NULL) {
    if (options->nBudgets == LINKS_MAX_BUDGETS)
      return perfErrorSet(error, "--ctas: more than %d", LINKS_MAX_BUDGETS);
    if (optionInt32("--ctas", one, 1, 1024, &options->budgets[options->nBudgets++], error) != 0) return -1;
  }
  return 0;
}

static int links_option_apply(int key, const char *text, linksOptions_t *options, perfError_t *error) {
  switch (key) {
  case 'g':
    return optionInt32("--gpus", text, 1, LINKS_MAX_GPUS, &options->nGpus, error);
  case KEY_BYTES:
    if (optionBytes("--bytes", text, 16, INT64_C(1) << 36, &options->bytes, error) != 0) return -1;
    return options->bytes % 16 == 0 ? 0 : perfErrorSet(error, "--bytes must be a multiple of 16");
  case 'n':
    return optionInt32("--iters", text, 1, 10000, &options->rounds, error);
  case KEY_CTAS:
    return links_budgets_parse(text, options, error);
  case KEY_FLAGS:
    return optionInt32("--flags", text, 1, 1 << 24, &options->trips, error);
  case KEY_LIST:
    options->list = 1;
    return 0;
  case 'J':
    options->jsonPath = text;
    return 0;
  case ARGP_KEY_ARG:
    return perfErrorSet(error, "unexpected argument '%s'", text);
  default:
    return 1;
  }
}

static error_t links_option_parse(int key, char *text, struct argp_state *state) {
  perfError_t error;
  int status = links_option_apply(key, text, state->input, &error);
  if (status < 0) argp_error(state, "%s", error.text);
  return status > 0 ? ARGP_ERR_UNKNOWN : 0;
}

int main(int argc, char **argv) {
  static const struct argp parser = {linksOptionTable, links_option_parse, NULL, linksDoc, NULL, NULL, NULL};
  static linksFigures_t figures;
  linksOptions_t options = {
      .bytes = 256 << 20, .rounds = 10, .trips = 1000, .nBudgets = 5, .budgets = {4, 8, 16, 24, 32}};
  perfError_t error = {""};
  argp_err_exit_status = PERF_EXIT_USAGE;
  if (argp_parse(&parser, argc, argv, 0, NULL, &options) != 0) return PERF_EXIT_USAGE;
  int status = linksFind(&options, &figures, &error);
  if (status == 0 && options.list) {
    linksList(&figures);
    return PERF_EXIT_OK;
  }
  if (status == 0) status = linksMeasure(&options, &figures, &error);
  if (status == 0) status = linksReport(&options, &figures, &error);
  if (status != 0) fprintf(stderr, "ultraep_links: %s\n", error.text);
  return status == 0 ? PERF_EXIT_OK : PERF_EXIT_FAILED;
}
