#include "bench_json.h"

#include "rows.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct benchJson {
  const benchOptions_t *options;
  const benchMachine_t *machine;
  json_t *document;
  json_t *results; /* array in document */
};

static void json_time_format(char *text, size_t size) {
  struct tm parts;
  time_t now = time(NULL);
  localtime_r(&now, &parts);
  strftime(text, size, "%Y-%m-%d %H:%M:%S", &parts);
}

static json_t *json_config_make(const benchOptions_t *options) {
  return json_pack("{s:i,s:I,s:I,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:f,s:i,s:s,s:s}", "nthreads",
                   (int)options->nRanks, "minimum_bytes", (json_int_t)options->minBytes, "maximum_bytes",
                   (json_int_t)options->maxBytes, "step_factor", (int)options->stepFactor, "warmup_iters",
                   (int)options->warmupIters, "iterations", (int)options->iters, "aggregated_iterations",
                   (int)options->aggIters, "validation", (int)options->check, "hidden", (int)options->hidden,
                   "slots", (int)options->nSlots, "domain", (int)options->nDomainRanks, "alignment",
                   (int)options->alignment, "tolerance", options->tolerance, "replica_rows",
                   (int)options->replicaRows, "dispatch_mode", benchDispatchModes[options->dispatchMode],
                   "combine_mode", benchCombineModes[options->combineMode]);
}

static json_t *json_machine_make(const benchOptions_t *options, const benchMachine_t *machine) {
  return json_pack("{s:s,s:i,s:i,s:i,s:i,s:i,s:f,s:I}", "device", machine->device, "devices",
                   (int)machine->nDevices, "processes", (int)options->nProcesses, "nccl_version",
                   (int)machine->ncclVersion, "max_ctas", (int)options->maxCtas, "graph", (int)options->graph,
                   "copy_gbps", machine->copyRate / 1e9, "communicator_bytes",
                   (json_int_t)machine->commBytes);
}

int benchJsonOpen(benchJson_t **json, const benchOptions_t *options, const benchMachine_t *machine, int argc,
                  char **argv, perfError_t *error) {
  char now[64];
  *json = NULL;
  if (options->jsonPath == NULL) return 0;
  benchJson_t *opened = calloc(1, sizeof(*opened));
  if (opened == NULL) return perfErrorSet(error, "no memory for the JSON document");
  opened->options = options;
  opened->machine = machine;
  json_t *arguments = json_array();
  for (int i = 0; i < argc; i++) json_array_append_new(arguments, json_string(argv[i]));
  opened->results = json_array();
  json_time_format(now, sizeof(now));
  opened->document = json_pack("{s:i,s:s,s:o,s:o,s:O}", "version", 1, "start_time", now, "args", arguments,
                               "config", json_config_make(options), "results", opened->results);
  bool whole = opened->document != NULL;
  if (whole && machine->nDevices > 0)
    whole = json_object_set_new(opened->document, "gpu", json_machine_make(options, machine)) == 0;
  if (!whole) {
    benchJsonDestroy(opened);
    return perfErrorSet(error, "no memory for the JSON document");
  }
  *json = opened;
  return 0;
}

static json_t *json_operation_make(double us, double bytes, int32_t nRanks) {
  double algorithm = us > 0 ? bytes / us / 1e3 : 0;
  return json_pack("{s:f,s:f,s:f}", "time", us, "alg_bw", algorithm, "bus_bw",
                   algorithm * (nRanks - 1) / nRanks);
}

static json_t *json_gpu_make(const benchResult_t *result) {
  return json_pack("{s:f,s:f,s:f,s:I,s:I,s:I,s:I,s:I,s:I}", "route_dispatch_us", result->us[BENCH_STEP],
                   "base_dispatch_us", result->us[BENCH_BASE_DISPATCH], "base_combine_us",
                   result->us[BENCH_BASE_COMBINE], "dispatch_moved_bytes", (json_int_t)result->dispatchMoved,
                   "combine_moved_bytes", (json_int_t)result->combineMoved, "memory_bytes",
                   (json_int_t)result->gpuBytes, "window_bytes", (json_int_t)result->windowBytes,
                   "private_bytes", (json_int_t)result->privateBytes, "slot_bytes",
                   (json_int_t)result->slotBytes);
}

/* Null where it is not known. */
static json_t *json_busiest_make(const int64_t *bytes) {
  json_t *known[2] = {json_null(), json_null()};
  const benchPhase_t phases[2] = {BENCH_DISPATCH, BENCH_COMBINE};
  for (int i = 0; i < 2; i++)
    if (bytes[phases[i]] >= 0) known[i] = json_integer((json_int_t)bytes[phases[i]]);
  return json_pack("{s:o,s:o}", "dispatch", known[0], "combine", known[1]);
}

int benchJsonAppend(benchJson_t *json, json_t *line, perfError_t *error) {
  if (json_array_append_new(json->results, line) == 0) return 0;
  return perfErrorSet(error, "no memory for the JSON document");
}

int benchJsonSet(benchJson_t *json, const char *name, json_t *value, perfError_t *error) {
  if (json_object_set_new(json->document, name, value) == 0) return 0;
  return perfErrorSet(error, "no memory for the JSON document");
}

int benchJsonLine(benchJson_t *json, const workload_t *workload, bool balance, int64_t size, int64_t count,
                  const benchResult_t *result, perfError_t *error) {
  if (json == NULL) return 0;
  int32_t nRanks = workload->nRanks;
  json_t *line = json_pack(
      "{s:I,s:I,s:s,s:s,s:i,s:i,s:I,s:i,s:i,s:f,s:f,s:i,s:f,s:f,s:o,s:o,s:f,s:I,s:I,s:{s:I,s:I,s:I},s:o}",
      "size", (json_int_t)size, "count", (json_int_t)count, "type", rowTypeName(json->options->dataType),
      "record", workload->label, "balance", (int)balance, "tokens", (int)workload->nominalTokens, "rows",
      (json_int_t)result->rows, "experts", (int)workload->nExperts, "topk", (int)workload->topK, "before",
      result->before, "after", result->after, "replicas", (int)result->replicas, "route_us",
      result->us[BENCH_ROUTE], "weights_us", result->us[BENCH_WEIGHTS], "dispatch",
      json_operation_make(result->us[BENCH_DISPATCH],
                          (double)result->maxRows * (double)result->dispatchRowBytes, nRanks),
      "combine",
      json_operation_make(result->us[BENCH_COMBINE],
                          (double)result->maxRows * (double)result->combineRowBytes, nRanks),
      "memcpy_us", result->us[BENCH_COPY], "memcpy_bytes", (json_int_t)result->copyBytes, "nwrong",
      (json_int_t)result->wrong, "link_bytes", "dispatch", (json_int_t)result->linkBytes[BENCH_DISPATCH],
      "combine", (json_int_t)result->linkBytes[BENCH_COMBINE], "weights",
      (json_int_t)result->linkBytes[BENCH_WEIGHTS], "busiest_link_bytes",
      json_busiest_make(result->busiestBytes));
  bool whole = line != NULL && json_object_set_new(line, "gate", gateJson(&result->gate)) == 0;
  if (whole && json->options->grads != BENCH_GRADS_NONE)
    whole = json_object_set_new(line, "grads_us", json_real(result->us[BENCH_GRADS])) == 0;
  if (whole && json->machine->nDevices > 0)
    whole = json_object_set_new(line, "gpu", json_gpu_make(result)) == 0;
  if (whole) return benchJsonAppend(json, line, error);
  json_decref(line);
  return perfErrorSet(error, "no memory for the JSON document");
}

int benchJsonFinish(benchJson_t *json, int64_t wrong, double busBandwidth, perfError_t *error) {
  if (json == NULL) return 0;
  return benchJsonWrite(json,
                        json_pack("{s:{s:I,s:b},s:{s:f}}", "out_of_bounds", "count", (json_int_t)wrong,
                                  "okay", wrong == 0, "average_bus_bandwidth", "bandwidth", busBandwidth),
                        error);
}

int benchJsonWrite(benchJson_t *json, json_t *tail, perfError_t *error) {
  char now[64];
  json_time_format(now, sizeof(now));
  if (tail != NULL && json_object_set_new(tail, "end_time", json_string(now)) != 0) {
    json_decref(tail);
    tail = NULL;
  }
  int updated = tail == NULL ? -1 : json_object_update(json->document, tail);
  json_decref(tail);
  if (updated != 0) return perfErrorSet(error, "no memory for the JSON document");
  const char *path = json->options->jsonPath;
  if (json_dump_file(json->document, path, JSON_INDENT(1) | JSON_REAL_PRECISION(10)) != 0) {
    return perfErrorSet(error, "%s: cannot be written: %s", path, strerror(errno));
  }
  return 0;
}

void benchJsonDestroy(benchJson_t *json) {
  if (json == NULL) return;
  json_decref(json->document);
  json_decref(json->results);
  free(json);
}
