/* Checks of what callers pass in structs, and what follows from a config. Pure functions: no group, no
 * memory, no clock; any bytes in the structs give an error code and a message, never a crash. */
#ifndef ULTRAEP_CONFIG_H_
#define ULTRAEP_CONFIG_H_

#include "ultraep.h"

#include <stdbool.h>
#include <string.h>

#define CONFIG_MIN_ROW_BYTES 16
#define CONFIG_MAX_ROW_BYTES (1 << 20)
#define CONFIG_MAX_TOKENS (1 << 24)
#define CONFIG_MAX_ROUTES 4096
#define CONFIG_MAX_ALIGNMENT 4096
#define CONFIG_MAX_EXPERT_BYTES (INT64_C(1) << 40)
#define CONFIG_MAX_RECV_ROWS INT32_MAX /* so that a row's number fits 32 bits on every backend */

/* Every rule on a config that needs no other rank. */
ultraepResult_t config_check(const ultraepConfig_t *config, int nRanks);
/* The first field in which two configs differ, or null. */
const char *config_difference(const ultraepConfig_t *a, const ultraepConfig_t *b);
/* The number of the word that the text is; false, and *value left alone, if it is none. */
static inline bool config_read_word(const char *const *words, size_t n, const char *text, int32_t *value) {
  for (size_t i = 0; i < n && words[i]; i++)
    if (strcmp(text, words[i]) == 0) {
      *value = (int32_t)i;
      return true;
    }
  return false;
}

/* ULTRAEP_PEERS in the environment; by ultraepPeers_t. */
#define CONFIG_PEERS_VARIABLE "ULTRAEP_PEERS"
#define CONFIG_PEERS_WORDS "auto", "window", "ipc"
bool config_peers_read(const char *text, int32_t *peers);

/* What a rank says of its peers' memory: its config's wish, or its environment's. */
typedef struct {
  int32_t wish; /* ultraepPeers_t */
  int32_t hasWindows;
} configPeers_t;
/* The way that all ranks go, alike on all: sets *peers to ULTRAEP_PEERS_WINDOW or _IPC and returns null, or
 * returns what is wrong, found at *rank. */
const char *config_peers_choose(const configPeers_t *ranks, int nRanks, int32_t *peers, int *rank);

/* For a checked config: what the planner is asked. nDomainRanks is what the backend found or the config says.
 * The gate is that of the config alone: nothing measured, nothing registered. */
ultraepPlannerConfig_t config_planner(const ultraepConfig_t *config, int nRanks, int nDomainRanks);

/* What a backend measured once, when experts were registered, for what the config does not say. Must be equal
 * on every rank, or plans would differ: ranks agree on one value first. 0: not measured, the default stands.
 */
typedef struct {
  double linkBytesPerSecond;   /* at which one rank sends weights */
  double weightBytesPerSecond; /* weights over the time that an expert takes for one row, when it has many */
} configRates_t;
/* Sets the planner's rowPs, copyPs and relayCopies for a checked config, from what is given, else measured,
 * else the default. measured may be null; experts is the registered shape, or null. */
void config_gate(const ultraepConfig_t *config, const configRates_t *measured,
                 const ultraepExperts_t *experts, ultraepPlannerConfig_t *planner);
/* Room for rows was made before anything was measured: copies are not dearer than that the rows which the
 * gate may leave on a rank for them have room. */
void config_gate_limit(const ultraepConfig_t *config, int nRanks, int64_t maxRecvRows,
                       ultraepPlannerConfig_t *planner);
/* For a checked config: thread blocks of a kernel at most, the library's choice where none is given. */
int32_t config_blocks(const ultraepConfig_t *config);
/* For a checked config: what ULTRAEP_DISPATCH_AUTO means on GPUs; another mode stands. ownDevices: every rank
 * has a GPU of its own, so that there are links between them. */
int32_t config_dispatch_mode(const ultraepConfig_t *config, int nRanks, bool ownDevices);
/* For a checked config: the rows a rank may receive, padding included. */
int64_t config_recv_rows(const ultraepConfig_t *config, int nRanks);

/* Bytes of an element; 0 for a type that does not exist. */
size_t config_type_bytes(int32_t dataType);
const char *config_type_name(int32_t dataType);
/* True for the types that a combine can add. */
bool config_type_adds(int32_t dataType);
/* Sets *rowBytes for rows of config.hidden elements of the type (never ULTRAEP_DATATYPE_DEFAULT here). */
ultraepResult_t config_row_bytes(const ultraepConfig_t *config, int32_t dataType, size_t *rowBytes);

/* Every rule on tensors that needs neither the symmetric memory nor another rank. nTokens is the route's. */
ultraepResult_t config_check_tensors(const ultraepConfig_t *config, const ultraepTensors_t *tensors,
                                     ultraepDirection_t direction, int64_t nTokens, int64_t maxRecvRows);
/* Every rule on expert tensors that needs neither the symmetric memory nor another rank. */
ultraepResult_t config_check_experts(const ultraepExperts_t *experts);

#endif
