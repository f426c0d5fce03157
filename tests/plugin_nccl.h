/* A stand-in for NCCL's side of the tuner interface, for tests without NCCL: opens a plugin by the name rules
 * of each release, picks a table as it does, and calls it in its order with memory laid out as NCCL's.
 *
 * It sees a table as NCCL's machine code does, a name and functions by slot, and has its own view of their
 * arguments: nothing here comes from the plugin's headers, so a slip there cannot hide. */
#ifndef ULTRAEP_TESTS_PLUGIN_NCCL_H_
#define ULTRAEP_TESTS_PLUGIN_NCCL_H_

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NCCL_NEWEST_TABLE 6

struct nccl_release {
  const char *name;
  int openFlags;      /* of dlopen */
  bool usesPrefix;    /* tries libnccl-tuner-<value>.so after <value> */
  bool skipsPrefixed; /* ... but not for a value that has a slash or is lib*.so already */
  bool opensNet; /* tries NCCL_NET_PLUGIN's names too; later releases do so only for a working net plugin */
  int newest, oldest; /* tables it takes */
  int nAlgorithms;    /* rows of its cost table, three protocols each */
};

extern const struct nccl_release ncclReleases[];
extern const int ncclReleaseCount;

/* What NCCL tells of a communicator. */
struct nccl_shape {
  size_t nRanks, nNodes;
  int nDomains, minRanks, maxRanks;
};

typedef void (*nccl_logger)(int level, unsigned long subsystems, const char *where, int line,
                            const char *format, ...);

/* A table found in a library. */
struct nccl_tuner {
  int version;
  void *const *slots;
};

/* One rank of a communicator. */
struct nccl_comm {
  const struct nccl_tuner *tuner;
  void *context;
};

/* Opens the library that `release` would take for these values of NCCL_TUNER_PLUGIN and NCCL_NET_PLUGIN
 * (null: not set), or returns null. To be closed with dlclose. */
void *nccl_library_open(const struct nccl_release *release, const char *tunerValue, const char *netValue);
/* The newest table in the library from newest down to oldest. False if there is none. */
bool nccl_tuner_find(void *library, int newest, int oldest, struct nccl_tuner *tuner);

/* These return null, or what the plugin did that NCCL would suffer from. */
const char *nccl_comm_init(struct nccl_comm *comm, const struct nccl_tuner *tuner,
                           const struct nccl_shape *shape, uint64_t commId, nccl_logger logger);
const char *nccl_comm_collectives(const struct nccl_comm *comm, int nAlgorithms);
const char *nccl_comm_destroy(struct nccl_comm *comm);

#endif
