#include "plugin_nccl.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SLOT_NAME, SLOT_INIT, SLOT_COLLECTIVE, SLOT_CLOSE, SLOT_CHUNK };
enum { PROTOCOLS = 3, CONSTANTS = 144 };

/* name, flags, usesPrefix, skipsPrefixed, opensNet, newest, oldest, nAlgorithms */
const struct nccl_release ncclReleases[] = {
    {"2.19", RTLD_LAZY | RTLD_LOCAL, false, false, false, 1, 1, 6},
    {"2.20", RTLD_LAZY | RTLD_LOCAL, false, false, false, 1, 1, 6},
    {"2.21", RTLD_LAZY | RTLD_LOCAL, true, false, true, 2, 2, 6},
    {"2.22", RTLD_LAZY | RTLD_LOCAL, true, false, true, 3, 2, 6},
    {"2.23", RTLD_LAZY | RTLD_LOCAL, true, false, true, 3, 2, 7},
    {"2.24", RTLD_LAZY | RTLD_LOCAL, true, false, true, 4, 2, 7},
    {"2.25", RTLD_LAZY | RTLD_LOCAL, true, false, true, 4, 2, 7},
    {"2.26", RTLD_NOW | RTLD_LOCAL, true, false, false, 4, 2, 7},
    {"2.27", RTLD_NOW | RTLD_LOCAL, true, true, false, 4, 2, 7},
    {"2.28", RTLD_NOW | RTLD_LOCAL, true, true, false, 5, 2, 7},
    {"2.29", RTLD_NOW | RTLD_LOCAL, true, true, false, 5, 2, 7},
    {"2.30", RTLD_NOW | RTLD_LOCAL, true, true, false, 6, 2, 7},
};
const int ncclReleaseCount = sizeof(ncclReleases) / sizeof(ncclReleases[0]);

/* ---- finding the library ---- */
static bool is_prefixed(const char *value) {
  size_t length = strlen(value);

  return strchr(value, '/') ||
         (strncmp(value, "lib", 3) == 0 && length >= 3 && strcmp(value + length - 3, ".so") == 0);
}

static void *open_role(const struct nccl_release *release, const char *role, const char *value) {
  char name[512];
  void *library;

  if (!value) {
    snprintf(name, sizeof(name), "libnccl-%s.so", role);
    return release->usesPrefix ? dlopen(name, release->openFlags) : NULL;
  }
  library = dlopen(value, release->openFlags);
  if (library || !release->usesPrefix) return library;
  if (release->skipsPrefixed && is_prefixed(value)) return NULL;
  snprintf(name, sizeof(name), "libnccl-%s-%s.so", role, value);
  return dlopen(name, release->openFlags);
}

void *nccl_library_open(const struct nccl_release *release, const char *tunerValue, const char *netValue) {
  void *library = open_role(release, "tuner", tunerValue);

  if (!library && release->opensNet) library = open_role(release, "net", netValue);
  return library;
}

bool nccl_tuner_find(void *library, int newest, int oldest, struct nccl_tuner *tuner) {
  char symbol[32];

  for (int version = newest; version >= oldest; version--) {
    snprintf(symbol, sizeof(symbol), "ncclTunerPlugin_v%d", version);
    tuner->slots = dlsym(library, symbol);
    if (!tuner->slots) continue;
    tuner->version = version;
    return true;
  }
  return false;
}

/* ---- the functions in the slots, by table ---- */
typedef int (*init_v1_fn)(size_t nRanks, size_t nNodes, nccl_logger logger);
typedef int (*init_v2_fn)(size_t nRanks, size_t nNodes, nccl_logger logger, void **context);
typedef int (*init_v5_fn)(void **context, uint64_t commId, size_t nRanks, size_t nNodes, nccl_logger logger,
                          int *domains, double *constants);
typedef int (*collective_v1_fn)(int function, size_t nBytes, int collNet, int nvls, int pipelined,
                                int *algorithm, int *protocol, int *nChannels);
typedef int (*collective_v2_fn)(void *context, int function, size_t nBytes, int collNet, int nvls,
                                int pipelined, int *algorithm, int *protocol, int *nChannels);
typedef int (*collective_v3_fn)(void *context, int function, size_t nBytes, int pipelined, float **costs,
                                int nAlgorithms, int nProtocols, int *nChannels);
typedef int (*collective_v4_fn)(void *context, int function, size_t nBytes, int pipelined, float **costs,
                                int nAlgorithms, int nProtocols, int registered, int *nChannels);
typedef int (*close_v1_fn)(void);
typedef int (*close_v2_fn)(void *context);
typedef int (*chunk_v6_fn)(void *context, int function, size_t nBytes, int algorithm, int protocol,
                           int nChannels, size_t *chunkSize);

/* ISO C has no cast from an object pointer to a function pointer; POSIX promises that the bits are the same.
 */
#define SLOT(tuner, slot, type) (*(type *)(const void *)(&(tuner)->slots[slot]))

/* ---- a communicator's life ---- */
/* Byte by byte: also a NaN or a zero's sign must stay. */
static bool differs(const void *before, const void *after, size_t bytes) {
  return memcmp(before, after, bytes) != 0;
}

static int init_v5(struct nccl_comm *comm, const struct nccl_shape *shape, uint64_t commId,
                   nccl_logger logger, bool *changed) {
  int domains[3] = {shape->nDomains, shape->minRanks, shape->maxRanks}, domainsBefore[3];
  double constants[CONSTANTS], constantsBefore[CONSTANTS];
  int result;

  for (int i = 0; i < CONSTANTS; i++) constants[i] = 0.25 * i - 3;
  memcpy(constantsBefore, constants, sizeof(constants));
  memcpy(domainsBefore, domains, sizeof(domains));
  result = SLOT(comm->tuner, SLOT_INIT, init_v5_fn)(&comm->context, commId, shape->nRanks, shape->nNodes,
                                                    logger, domains, constants);
  *changed = differs(constantsBefore, constants, sizeof(constants)) ||
             differs(domainsBefore, domains, sizeof(domains));
  return result;
}

const char *nccl_comm_init(struct nccl_comm *comm, const struct nccl_tuner *tuner,
                           const struct nccl_shape *shape, uint64_t commId, nccl_logger logger) {
  const char *name = tuner->slots[SLOT_NAME];
  bool changed = false;
  int result;

  *comm = (struct nccl_comm){.tuner = tuner};
  if (!name || !name[0]) return "the table has no name";
  if (tuner->version >= 5) {
    result = init_v5(comm, shape, commId, logger, &changed);
  } else if (tuner->version >= 2) {
    result = SLOT(tuner, SLOT_INIT, init_v2_fn)(shape->nRanks, shape->nNodes, logger, &comm->context);
  } else {
    result = SLOT(tuner, SLOT_INIT, init_v1_fn)(shape->nRanks, shape->nNodes, logger);
  }
  if (result != 0) return "init failed";
  return changed ? "init changed the domains or the constants" : NULL;
}

static const char *collective_chosen(const struct nccl_comm *comm, int function, size_t nBytes, int pipelined,
                                     int channels) {
  int algorithm = -1, protocol = -1, nChannels = channels, result;

  if (comm->tuner->version == 1) {
    result = SLOT(comm->tuner, SLOT_COLLECTIVE, collective_v1_fn)(function, nBytes, 1, 1, pipelined,
                                                                  &algorithm, &protocol, &nChannels);
  } else {
    result = SLOT(comm->tuner, SLOT_COLLECTIVE, collective_v2_fn)(
        comm->context, function, nBytes, 0, 1, pipelined, &algorithm, &protocol, &nChannels);
  }
  if (result != 0) return "getCollInfo failed";
  if (algorithm != -1 || protocol != -1) return "getCollInfo chose an algorithm or a protocol";
  return nChannels == channels ? NULL : "getCollInfo chose the channels";
}

/* The cost table is one array of exactly its size, so that a sanitizer sees a step outside. */
static const char *collective_priced(const struct nccl_comm *comm, int function, size_t nBytes, int pipelined,
                                     int channels, int nAlgorithms) {
  size_t bytes = (size_t)nAlgorithms * PROTOCOLS * sizeof(float);
  float *costs = malloc(bytes), *before = malloc(bytes);
  const char *error = NULL;
  int nChannels = channels, result;

  if (!costs || !before) {
    error = "no memory for the test";
    goto free_costs;
  }
  for (int i = 0; i < nAlgorithms * PROTOCOLS; i++) {
    costs[i] = i % 4 == 3 ? -1.0f : (float)nBytes / (float)(40 + i) + (float)(i * pipelined);
  }
  memcpy(before, costs, bytes);
  if (comm->tuner->version == 3) {
    result = SLOT(comm->tuner, SLOT_COLLECTIVE, collective_v3_fn)(comm->context, function, nBytes, pipelined,
                                                                  (float **)(void *)costs, nAlgorithms,
                                                                  PROTOCOLS, &nChannels);
  } else {
    result = SLOT(comm->tuner, SLOT_COLLECTIVE, collective_v4_fn)(comm->context, function, nBytes, pipelined,
                                                                  (float **)(void *)costs, nAlgorithms,
                                                                  PROTOCOLS, function % 2, &nChannels);
  }
  if (result != 0) {
    error = "getCollInfo failed";
  } else if (differs(before, costs, bytes)) {
    error = "getCollInfo changed the cost table";
  } else if (nChannels != channels) {
    error = "getCollInfo chose the channels";
  }
free_costs:
  free(costs);
  free(before);
  return error;
}

static const char *collective_chunk(const struct nccl_comm *comm, int function, size_t nBytes) {
  size_t chunkSize = 131072 + nBytes % 4096;
  const size_t before = chunkSize;

  if (comm->tuner->version < 6 || !comm->tuner->slots[SLOT_CHUNK]) return NULL;
  if (SLOT(comm->tuner, SLOT_CHUNK, chunk_v6_fn)(comm->context, function, nBytes, 1, 2, 16, &chunkSize) !=
      0) {
    return "getChunkSize failed";
  }
  return chunkSize == before ? NULL : "getChunkSize changed the chunk size";
}

/* Every collective that a tuner is asked about: broadcast, reduce, all-gather, reduce-scatter, all-reduce.
 * NCCL passes 0 channels; the second value finds a plugin that writes 0 itself. */
const char *nccl_comm_collectives(const struct nccl_comm *comm, int nAlgorithms) {
  static const size_t sizes[] = {0, 1, 4096, 3 * 1000 * 1000 + 1, (size_t)1 << 34};
  const char *error;

  for (int function = 0; function < 5; function++) {
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
      int pipelined = 1 + (int)i, channels = (function + (int)i) % 2 ? 77 : 0;

      if (comm->tuner->version <= 2) {
        error = collective_chosen(comm, function, sizes[i], pipelined, channels);
      } else {
        error = collective_priced(comm, function, sizes[i], pipelined, channels, nAlgorithms);
      }
      if (!error) error = collective_chunk(comm, function, sizes[i]);
      if (error) return error;
    }
  }
  return NULL;
}

const char *nccl_comm_destroy(struct nccl_comm *comm) {
  int result = comm->tuner->version == 1 ? SLOT(comm->tuner, SLOT_CLOSE, close_v1_fn)()
                                         : SLOT(comm->tuner, SLOT_CLOSE, close_v2_fn)(comm->context);

  comm->context = NULL;
  return result == 0 ? NULL : "finalize failed";
}
