/* Ranks as threads of a host world: own and host memory are one. */
#include "bench_run.h"

#include <string.h>
#include <unistd.h>

static int host_open(const benchOptions_t *options, benchMachine_t *machine, perfError_t *error) {
  (void)options;
  (void)machine;
  (void)error;
  return 0;
}

static void host_close(void) {}

static double host_memory_there(const char **what) {
  *what = "this machine has";
  return (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
}

static int host_run_open(benchRun_t *run, perfError_t *error) {
  ultraepHostWorld_t world = NULL;
  ultraepResult_t created = ultraepHostWorldCreate(&world, run->workload->nRanks);
  if (created != ultraepSuccess) {
    return perfErrorSet(error, "ultraepHostWorldCreate: %s: %.300s", ultraepGetErrorString(created),
                        ultraepGetLastError());
  }
  run->world = world;
  return 0;
}

static void host_run_close(benchRun_t *run) {
  ultraepHostWorldDestroy(run->world);
}

static int host_rank_open(benchRank_t *rank) {
  (void)rank;
  return 0;
}

static void host_rank_close(benchRank_t *rank) {
  (void)rank;
}

static ultraepResult_t host_group_create(benchRank_t *rank, const ultraepConfig_t *config) {
  return ultraepGroupCreateHost(&rank->group, rank->run->world, rank->rank, config);
}

static int host_copy(benchRank_t *rank, void *to, const void *from, size_t bytes) {
  (void)rank;
  if (to != from && bytes > 0) memcpy(to, from, bytes);
  return 0;
}

static int host_fill(benchRank_t *rank, void *to, int byte, size_t bytes) {
  (void)rank;
  memset(to, byte, bytes);
  return 0;
}

static int host_phase_time(benchRank_t *rank, benchPhase_t phase, benchCall_t call) {
  int status = 0;
  (void)phase;
  rank->start = perfSeconds();
  for (int32_t i = 0; i < rank->run->timedCalls && status == 0; i++) status = call(rank);
  rank->end = perfSeconds();
  return status;
}

const benchOps_t benchHostOps = {.open = host_open,
                                 .close = host_close,
                                 .memoryThere = host_memory_there,
                                 .runOpen = host_run_open,
                                 .runClose = host_run_close,
                                 .rankOpen = host_rank_open,
                                 .rankClose = host_rank_close,
                                 .groupCreate = host_group_create,
                                 .copy = host_copy,
                                 .fill = host_fill,
                                 .phaseTime = host_phase_time};
