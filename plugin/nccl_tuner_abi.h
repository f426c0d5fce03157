/* The binary interface between NCCL and a tuner plugin, table versions 1 to 6, after NCCL's public headers.
 *
 * NCCL looks for ncclTunerPlugin_v<N> in the library it opened, newest N first, and takes what it finds:
 *
 *   table  newest one of    what changed
 *   v1     2.19, 2.20       no context: one state for all communicators
 *   v2     2.21             a context per communicator
 *   v3     2.22, 2.23       a table of costs instead of one algorithm and protocol
 *   v4     2.24 to 2.27     getCollInfo is told whether the buffers are registered
 *   v5     2.28, 2.29       init gets the communicator's id, the NVLink domains and NCCL's cost constants
 *   v6     2.30 and later   getChunkSize
 *
 * A release takes older tables too, down to v2; 2.19 to 2.21 take their own alone. Everything that depends on
 * NCCL's version is in this file and tuner.c.
 *
 * NCCL calls init once per rank and communicator, from that rank's thread, so several at once; getCollInfo
 * for each collective, but not for send/recv; and finalize at the end (destroy, up to v4). A result other
 * than success fails the communicator or the collective. NCCL's enums are int here: the same size.
 */
#ifndef ULTRAEP_NCCL_TUNER_ABI_H_
#define ULTRAEP_NCCL_TUNER_ABI_H_

#include "ultraep.h"

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

/* ---- NCCL's logger ---- */
enum { NCCL_ABI_LOG_INFO = 3 }; /* level: shown where NCCL_DEBUG asks for it or more */

/* Subsystems, bits: shown where NCCL_DEBUG_SUBSYS, by default INIT and a few others, has one of them. */
enum { NCCL_ABI_SUBSYS_INIT = 0x1, NCCL_ABI_SUBSYS_TUNING = 0x40 };

/* where: the name of the function. NCCL adds host, process, device and the newline. */
typedef void (*nccl_abi_logger_t)(int level, unsigned long subsystems, const char *where, int line,
                                  const char *format, ...) __attribute__((format(printf, 5, 6)));

/* ---- what init is told since v5 ---- */
typedef struct {
  int nDomains; /* NVLink domains of the communicator */
  int minRanks; /* ranks in the smallest of them */
  int maxRanks; /* ranks in the largest */
} nccl_abi_nvl_domains_t;

enum {
  NCCL_ABI_ALGORITHMS = 7, /* tree, ring, CollNet direct and chain, NVLS, NVLS tree, PAT */
  NCCL_ABI_PROTOCOLS = 3,  /* LL, LL128, simple */
  NCCL_ABI_LINKS = 3,      /* NVLink, PCI, network */
  NCCL_ABI_GPU_KINDS = 4,  /* Volta, Ampere, Hopper, Blackwell */
  NCCL_ABI_SCALES = 3      /* 1, 2, 4 nodes */
};

/* NCCL's cost model, which a tuner may adjust in init: latencies in microseconds, rates in GB/s. */
typedef struct {
  double baseLatency[NCCL_ABI_ALGORITHMS][NCCL_ABI_PROTOCOLS];
  double linkLatency[NCCL_ABI_LINKS][NCCL_ABI_ALGORITHMS][NCCL_ABI_PROTOCOLS];
  double maxRateLL[NCCL_ABI_GPU_KINDS][NCCL_ABI_SCALES];
  double channelRateRingLL128[NCCL_ABI_GPU_KINDS][NCCL_ABI_SCALES];
  double channelRateTreeLL128[NCCL_ABI_GPU_KINDS][NCCL_ABI_SCALES];
  double channelRateTree[NCCL_ABI_GPU_KINDS][NCCL_ABI_SCALES];
  double channelRateNvlsTree[NCCL_ABI_GPU_KINDS][NCCL_ABI_SCALES];
} nccl_abi_tuner_constants_t;

/* ---- the tables ----
 *   name        shown in NCCL's log
 *   nBytes      the larger of what one rank sends and receives
 *   nPipelined  like operations that are merged into this one
 *   algorithm, protocol  -1 on entry: NCCL chooses
 *   costs       [nAlgorithms][nProtocols] microseconds, -1 for a pair that cannot be used; NCCL takes the
 *               lowest. Its prototype says float **, but what it passes is this one flat array.
 *   nChannels   0 on entry: NCCL chooses
 */
typedef struct {
  const char *name;
  ultraepResult_t (*init)(size_t nRanks, size_t nNodes, nccl_abi_logger_t logger);
  ultraepResult_t (*getCollInfo)(int collective, size_t nBytes, int hasCollNet, int hasNvls, int nPipelined,
                                 int *algorithm, int *protocol, int *nChannels);
  ultraepResult_t (*destroy)(void);
} nccl_abi_tuner_v1_t;

typedef struct {
  const char *name;
  ultraepResult_t (*init)(size_t nRanks, size_t nNodes, nccl_abi_logger_t logger, void **context);
  ultraepResult_t (*getCollInfo)(void *context, int collective, size_t nBytes, int hasCollNet, int hasNvls,
                                 int nPipelined, int *algorithm, int *protocol, int *nChannels);
  ultraepResult_t (*destroy)(void *context);
} nccl_abi_tuner_v2_t;

typedef struct {
  const char *name;
  ultraepResult_t (*init)(size_t nRanks, size_t nNodes, nccl_abi_logger_t logger, void **context);
  ultraepResult_t (*getCollInfo)(void *context, int collective, size_t nBytes, int nPipelined, float *costs,
                                 int nAlgorithms, int nProtocols, int *nChannels);
  ultraepResult_t (*destroy)(void *context);
} nccl_abi_tuner_v3_t;

typedef struct {
  const char *name;
  ultraepResult_t (*init)(size_t nRanks, size_t nNodes, nccl_abi_logger_t logger, void **context);
  ultraepResult_t (*getCollInfo)(void *context, int collective, size_t nBytes, int nPipelined, float *costs,
                                 int nAlgorithms, int nProtocols, int isRegistered, int *nChannels);
  ultraepResult_t (*destroy)(void *context);
} nccl_abi_tuner_v4_t;

typedef struct {
  const char *name;
  ultraepResult_t (*init)(void **context, uint64_t commId, size_t nRanks, size_t nNodes,
                          nccl_abi_logger_t logger, const nccl_abi_nvl_domains_t *domains,
                          nccl_abi_tuner_constants_t *constants);
  ultraepResult_t (*getCollInfo)(void *context, int collective, size_t nBytes, int nPipelined, float *costs,
                                 int nAlgorithms, int nProtocols, int isRegistered, int *nChannels);
  ultraepResult_t (*finalize)(void *context);
} nccl_abi_tuner_v5_t;

typedef struct {
  const char *name;
  ultraepResult_t (*init)(void **context, uint64_t commId, size_t nRanks, size_t nNodes,
                          nccl_abi_logger_t logger, const nccl_abi_nvl_domains_t *domains,
                          nccl_abi_tuner_constants_t *constants);
  ultraepResult_t (*getCollInfo)(void *context, int collective, size_t nBytes, int nPipelined, float *costs,
                                 int nAlgorithms, int nProtocols, int isRegistered, int *nChannels);
  ultraepResult_t (*finalize)(void *context);
  /* May be null. *chunkSize: bytes, NCCL's choice on entry. */
  ultraepResult_t (*getChunkSize)(void *context, int collective, size_t nBytes, int algorithm, int protocol,
                                  int nChannels, size_t *chunkSize);
} nccl_abi_tuner_v6_t;

/* ---- layout: a wrong one would be found only by a crash inside NCCL ---- */
static_assert(sizeof(ultraepResult_t) == sizeof(int) && ultraepSuccess == 0, "passed as ncclResult_t");
static_assert(sizeof(nccl_abi_nvl_domains_t) == 12, "three ints");
static_assert(offsetof(nccl_abi_nvl_domains_t, maxRanks) == 8, "the last of three ints");
static_assert(offsetof(nccl_abi_tuner_constants_t, linkLatency) == 21 * sizeof(double), "after 7 x 3");
static_assert(offsetof(nccl_abi_tuner_constants_t, maxRateLL) == 84 * sizeof(double), "after 3 x 7 x 3 more");
static_assert(sizeof(nccl_abi_tuner_constants_t) == 144 * sizeof(double), "and 5 x 4 x 3");

#define NCCL_ABI_TUNER_LAYOUT(version, slots, close)                                                         \
  static_assert(sizeof(nccl_abi_tuner_##version##_t) == (slots) * sizeof(void *), "pointers only");          \
  static_assert(offsetof(nccl_abi_tuner_##version##_t, name) == 0, "slot 0");                                \
  static_assert(offsetof(nccl_abi_tuner_##version##_t, init) == 1 * sizeof(void *), "slot 1");               \
  static_assert(offsetof(nccl_abi_tuner_##version##_t, getCollInfo) == 2 * sizeof(void *), "slot 2");        \
  static_assert(offsetof(nccl_abi_tuner_##version##_t, close) == 3 * sizeof(void *), "slot 3")
NCCL_ABI_TUNER_LAYOUT(v1, 4, destroy);
NCCL_ABI_TUNER_LAYOUT(v2, 4, destroy);
NCCL_ABI_TUNER_LAYOUT(v3, 4, destroy);
NCCL_ABI_TUNER_LAYOUT(v4, 4, destroy);
NCCL_ABI_TUNER_LAYOUT(v5, 4, finalize);
NCCL_ABI_TUNER_LAYOUT(v6, 5, finalize);
static_assert(offsetof(nccl_abi_tuner_v6_t, getChunkSize) == 4 * sizeof(void *), "slot 4");

ULTRAEP_API extern const nccl_abi_tuner_v1_t ncclTunerPlugin_v1;
ULTRAEP_API extern const nccl_abi_tuner_v2_t ncclTunerPlugin_v2;
ULTRAEP_API extern const nccl_abi_tuner_v3_t ncclTunerPlugin_v3;
ULTRAEP_API extern const nccl_abi_tuner_v4_t ncclTunerPlugin_v4;
ULTRAEP_API extern const nccl_abi_tuner_v5_t ncclTunerPlugin_v5;
ULTRAEP_API extern const nccl_abi_tuner_v6_t ncclTunerPlugin_v6;

#endif
