/* The results of ultraep_perf as a JSON document. */
#ifndef ULTRAEP_PERF_BENCH_JSON_H_
#define ULTRAEP_PERF_BENCH_JSON_H_

#include "bench.h"

#include <jansson.h>

typedef struct benchJson benchJson_t;

/* Sets *json to null where the options ask for none; every other function then does nothing. */
int benchJsonOpen(benchJson_t **json, const benchOptions_t *options, const benchMachine_t *machine, int argc,
                  char **argv, perfError_t *error);
int benchJsonLine(benchJson_t *json, const workload_t *workload, bool balance, int64_t size, int64_t count,
                  const benchResult_t *result, perfError_t *error);
/* For a tool with lines of its own: adds one, sets a value of the document, adds the values of tail and
 * writes the file. json is not null; line, value and tail are taken over, null ones fail. */
int benchJsonAppend(benchJson_t *json, json_t *line, perfError_t *error);
int benchJsonSet(benchJson_t *json, const char *name, json_t *value, perfError_t *error);
int benchJsonWrite(benchJson_t *json, json_t *tail, perfError_t *error);
/* Writes the file. */
int benchJsonFinish(benchJson_t *json, int64_t wrong, double busBandwidth, perfError_t *error);
void benchJsonDestroy(benchJson_t *json);

#endif
