/* NCCL's tuner role. It says in NCCL's log that the library is there and what NCCL tells it of the
 * communicator, and leaves every choice to NCCL; and it has the send and receive calls taken over
 * (takeover.h), which no tuner is asked about. From v5 on it is told the communicator's id, which the traffic
 * record then has (comm_id.h). The only state is one context per communicator and rank, which NCCL keeps.
 *
 * Every entry returns success, also where memory is short: an error would fail the user's communicator or
 * collective, and nothing here is worth that. NCCL may pass a null context, for it finalizes communicators
 * whose init never ran.
 *
 * One thing changes by the mere presence of a tuner, any tuner: NCCL 2.27 and later then skip their own
 * choice of algorithm under NCCL_CTA_POLICY_EFFICIENCY. */
#include "comm_id.h"
#include "nccl_tuner_abi.h"
#include "p2p.h"
#include "takeover.h"

#include <stdio.h>
#include <stdlib.h>

#define PLUGIN_TUNER_NAME "UltraEP"
#define PLUGIN_TUNER_TEXT(x) PLUGIN_TUNER_TEXT_(x)
#define PLUGIN_TUNER_TEXT_(x) #x
#define PLUGIN_TUNER_VERSION                                                                                 \
  PLUGIN_TUNER_TEXT(ULTRAEP_VERSION_MAJOR)                                                                   \
  "." PLUGIN_TUNER_TEXT(ULTRAEP_VERSION_MINOR) "." PLUGIN_TUNER_TEXT(ULTRAEP_VERSION_PATCH)

/* What NCCL tells of a communicator; the same on all its ranks. */
struct plugin_tuner {
  nccl_abi_logger_t logger; /* may be null */
  size_t nRanks;
  size_t nNodes;
  uint64_t commId; /* 0 before v5 */
  comm_told_t told;
};

/* The id as NCCL's own log lines have it, so that they can be matched. */
static void plugin_tuner_text_id(char *text, size_t size, uint64_t commId) {
  text[0] = '\0';
  if (commId != 0) snprintf(text, size, "commId 0x%llx, ", (unsigned long long)commId);
}

static void plugin_tuner_text_nodes(char *text, size_t size, size_t nRanks, size_t nNodes) {
  text[0] = '\0';
  if (nNodes == 0) return;
  if (nRanks % nNodes == 0) {
    snprintf(text, size, " (ranks per node: %zu)", nRanks / nNodes);
  } else {
    snprintf(text, size, " (ranks per node: %.1f on average)", (double)nRanks / (double)nNodes);
  }
}

/* domains: null before v5. */
static void plugin_tuner_text_domains(char *text, size_t size, const nccl_abi_nvl_domains_t *domains) {
  if (!domains || domains->nDomains <= 0) {
    snprintf(text, size, "not told");
  } else if (domains->minRanks == domains->maxRanks) {
    snprintf(text, size, "%d (ranks per domain: %d)", domains->nDomains, domains->maxRanks);
  } else {
    snprintf(text, size, "%d (ranks per domain: %d to %d)", domains->nDomains, domains->minRanks,
             domains->maxRanks);
  }
}

static void plugin_tuner_log_open(const struct plugin_tuner *tuner, const char *table,
                                  const nccl_abi_nvl_domains_t *domains) {
  char id[40], nodes[64], nvl[80];

  if (!tuner->logger) return;
  plugin_tuner_text_id(id, sizeof(id), tuner->commId);
  plugin_tuner_text_nodes(nodes, sizeof(nodes), tuner->nRanks, tuner->nNodes);
  plugin_tuner_text_domains(nvl, sizeof(nvl), domains);
  tuner->logger(NCCL_ABI_LOG_INFO, NCCL_ABI_SUBSYS_INIT | NCCL_ABI_SUBSYS_TUNING, __func__, __LINE__,
                "%s %s tuner %s: %sranks: %zu, nodes: %zu%s, NVLink domains: %s; NCCL's choices stand",
                PLUGIN_TUNER_NAME, PLUGIN_TUNER_VERSION, table, id, tuner->nRanks, tuner->nNodes, nodes, nvl);
}

static void plugin_tuner_log_close(const struct plugin_tuner *tuner) {
  char id[40];

  if (!tuner->logger) return;
  plugin_tuner_text_id(id, sizeof(id), tuner->commId);
  tuner->logger(NCCL_ABI_LOG_INFO, NCCL_ABI_SUBSYS_TUNING, __func__, __LINE__,
                "%s %s tuner: %sranks: %zu, nodes: %zu, closed", PLUGIN_TUNER_NAME, PLUGIN_TUNER_VERSION, id,
                tuner->nRanks, tuner->nNodes);
}

/* Sets *context to a copy of `tuner`, or to null where memory is short: all that is lost then is the closing
 * line of the log. */
static ultraepResult_t plugin_tuner_open(const struct plugin_tuner *tuner, const char *table,
                                         const nccl_abi_nvl_domains_t *domains, void **context) {
  struct plugin_tuner *copy;

  plugin_tuner_log_open(tuner, table, domains);
  takeover_start(tuner->logger);
  if (!context) return ultraepSuccess;
  copy = calloc(1, sizeof(*copy));
  *context = copy;
  if (!copy) return ultraepSuccess;
  copy->logger = tuner->logger;
  copy->nRanks = tuner->nRanks;
  copy->nNodes = tuner->nNodes;
  copy->commId = tuner->commId;
  copy->told.place = (uintptr_t)context;
  copy->told.id = tuner->commId;
  copy->told.rank = -1;
  copy->told.nRanks = (int)tuner->nRanks;
  copy->told.role = COMM_TOLD_TUNER;
  comm_told_add(&copy->told);
  return ultraepSuccess;
}

static ultraepResult_t plugin_tuner_close(void *context) {
  struct plugin_tuner *tuner = context;

  if (!tuner) return ultraepSuccess;
  p2p_comm_gone(comm_told_remove(&tuner->told));
  plugin_tuner_log_close(tuner);
  free(tuner);
  return ultraepSuccess;
}

/* ---- v1: NCCL keeps no context for us ---- */
static ultraepResult_t plugin_tuner_init_v1(size_t nRanks, size_t nNodes, nccl_abi_logger_t logger) {
  const struct plugin_tuner tuner = {.logger = logger, .nRanks = nRanks, .nNodes = nNodes};

  return plugin_tuner_open(&tuner, "v1", NULL, NULL);
}

static ultraepResult_t plugin_tuner_get_v1(int collective, size_t nBytes, int hasCollNet, int hasNvls,
                                           int nPipelined, int *algorithm, int *protocol, int *nChannels) {
  (void)collective, (void)nBytes, (void)hasCollNet, (void)hasNvls, (void)nPipelined;
  (void)algorithm, (void)protocol, (void)nChannels;
  return ultraepSuccess;
}

static ultraepResult_t plugin_tuner_destroy_v1(void) {
  return ultraepSuccess;
}

/* ---- v2 to v4 ---- */
static ultraepResult_t plugin_tuner_init_v2(size_t nRanks, size_t nNodes, nccl_abi_logger_t logger,
                                            void **context) {
  const struct plugin_tuner tuner = {.logger = logger, .nRanks = nRanks, .nNodes = nNodes};

  return plugin_tuner_open(&tuner, "v2", NULL, context);
}

static ultraepResult_t plugin_tuner_init_v3(size_t nRanks, size_t nNodes, nccl_abi_logger_t logger,
                                            void **context) {
  const struct plugin_tuner tuner = {.logger = logger, .nRanks = nRanks, .nNodes = nNodes};

  return plugin_tuner_open(&tuner, "v3", NULL, context);
}

static ultraepResult_t plugin_tuner_init_v4(size_t nRanks, size_t nNodes, nccl_abi_logger_t logger,
                                            void **context) {
  const struct plugin_tuner tuner = {.logger = logger, .nRanks = nRanks, .nNodes = nNodes};

  return plugin_tuner_open(&tuner, "v4", NULL, context);
}

static ultraepResult_t plugin_tuner_get_v2(void *context, int collective, size_t nBytes, int hasCollNet,
                                           int hasNvls, int nPipelined, int *algorithm, int *protocol,
                                           int *nChannels) {
  (void)context, (void)collective, (void)nBytes, (void)hasCollNet, (void)hasNvls, (void)nPipelined;
  (void)algorithm, (void)protocol, (void)nChannels;
  return ultraepSuccess;
}

static ultraepResult_t plugin_tuner_get_v3(void *context, int collective, size_t nBytes, int nPipelined,
                                           float *costs, int nAlgorithms, int nProtocols, int *nChannels) {
  (void)context, (void)collective, (void)nBytes, (void)nPipelined;
  (void)costs, (void)nAlgorithms, (void)nProtocols, (void)nChannels;
  return ultraepSuccess;
}

/* v4 to v6 */
static ultraepResult_t plugin_tuner_get_v4(void *context, int collective, size_t nBytes, int nPipelined,
                                           float *costs, int nAlgorithms, int nProtocols, int isRegistered,
                                           int *nChannels) {
  (void)context, (void)collective, (void)nBytes, (void)nPipelined;
  (void)costs, (void)nAlgorithms, (void)nProtocols, (void)isRegistered, (void)nChannels;
  return ultraepSuccess;
}

/* ---- v5 and v6 ---- */
static ultraepResult_t plugin_tuner_init_v5(void **context, uint64_t commId, size_t nRanks, size_t nNodes,
                                            nccl_abi_logger_t logger, const nccl_abi_nvl_domains_t *domains,
                                            nccl_abi_tuner_constants_t *constants) {
  const struct plugin_tuner tuner = {.logger = logger, .nRanks = nRanks, .nNodes = nNodes, .commId = commId};

  (void)constants;
  return plugin_tuner_open(&tuner, "v5", domains, context);
}

static ultraepResult_t plugin_tuner_init_v6(void **context, uint64_t commId, size_t nRanks, size_t nNodes,
                                            nccl_abi_logger_t logger, const nccl_abi_nvl_domains_t *domains,
                                            nccl_abi_tuner_constants_t *constants) {
  const struct plugin_tuner tuner = {.logger = logger, .nRanks = nRanks, .nNodes = nNodes, .commId = commId};

  (void)constants;
  return plugin_tuner_open(&tuner, "v6", domains, context);
}

/* ---- the tables ---- */
const nccl_abi_tuner_v1_t ncclTunerPlugin_v1 = {
    .name = PLUGIN_TUNER_NAME,
    .init = plugin_tuner_init_v1,
    .getCollInfo = plugin_tuner_get_v1,
    .destroy = plugin_tuner_destroy_v1,
};

const nccl_abi_tuner_v2_t ncclTunerPlugin_v2 = {
    .name = PLUGIN_TUNER_NAME,
    .init = plugin_tuner_init_v2,
    .getCollInfo = plugin_tuner_get_v2,
    .destroy = plugin_tuner_close,
};

const nccl_abi_tuner_v3_t ncclTunerPlugin_v3 = {
    .name = PLUGIN_TUNER_NAME,
    .init = plugin_tuner_init_v3,
    .getCollInfo = plugin_tuner_get_v3,
    .destroy = plugin_tuner_close,
};

const nccl_abi_tuner_v4_t ncclTunerPlugin_v4 = {
    .name = PLUGIN_TUNER_NAME,
    .init = plugin_tuner_init_v4,
    .getCollInfo = plugin_tuner_get_v4,
    .destroy = plugin_tuner_close,
};

const nccl_abi_tuner_v5_t ncclTunerPlugin_v5 = {
    .name = PLUGIN_TUNER_NAME,
    .init = plugin_tuner_init_v5,
    .getCollInfo = plugin_tuner_get_v4,
    .finalize = plugin_tuner_close,
};

/* getChunkSize stays null: with any function there, NCCL also clamps its own chunk size to the buffer's,
 * which some algorithms would exceed. */
const nccl_abi_tuner_v6_t ncclTunerPlugin_v6 = {
    .name = PLUGIN_TUNER_NAME,
    .init = plugin_tuner_init_v6,
    .getCollInfo = plugin_tuner_get_v4,
    .finalize = plugin_tuner_close,
    .getChunkSize = NULL,
};
