/* A stand-in for NCCL's side of the profiler interface, for tests without NCCL: the calls of every release in
 * its order, with events laid out as its machine code has them, by offsets. Nothing here comes from the
 * plugin's headers, so a slip there cannot hide. */
#ifndef ULTRAEP_TESTS_PLUGIN_EVENTS_H_
#define ULTRAEP_TESTS_PLUGIN_EVENTS_H_

#include "plugin_nccl.h"

#define NCCL_NEWEST_PROFILER 7

enum {
  EVENT_GROUP = 0x1,
  EVENT_COLL = 0x2,
  EVENT_P2P = 0x4,
  EVENT_PROXY_OP = 0x8,
  EVENT_PROXY_STEP = 0x10,
  EVENT_PROXY_CONTROL = 0x20,
  EVENT_KERNEL_CHANNEL = 0x40,
  EVENT_NET_PLUGIN = 0x80,
  EVENT_GROUP_API = 0x100,
  EVENT_COLL_API = 0x200,
  EVENT_P2P_API = 0x400,
  EVENT_KERNEL_LAUNCH = 0x800,
  EVENT_CE_COLL = 0x1000,
  EVENT_KERNEL_PHASE = 0x8000,
  EVENT_TYPES = 16
};

enum { OPERATION_COLL, OPERATION_SEND, OPERATION_RECV };

struct nccl_operation {
  int kind;
  size_t count;
  int type; /* ncclDataType_t */
  int peer; /* of a collective: the root */
  void *buffer;
};

/* A table found in a library, and NCCL's one mask for all communicators. */
struct nccl_profiler {
  int version;
  void *const *slots;
  int mask;
};

/* One rank of a communicator, which holds its contexts, as NCCL's does. */
struct nccl_profiled {
  struct nccl_profiler *profiler;
  const char *name;
  uint64_t hash;
  int nNodes, nRanks, rank;
  void *context;
};

/* Events started so far in this process, by bit of the type. */
extern long ncclEventsStarted[EVENT_TYPES];

/* Event types that a table of that version knows. */
int nccl_profiler_types(int version);
bool nccl_profiler_find(void *library, int newest, int oldest, struct nccl_profiler *profiler);

/* These return null, or what the plugin did that NCCL would suffer from. */
const char *nccl_profiled_init(struct nccl_profiled *comm, nccl_logger logger);
/* The calls for one group of operations, with proxies where asked for and the mask has them. foreign: and
 * what a shared proxy does for another process, whose context that is. */
const char *nccl_profiled_group(struct nccl_profiled *comm, const struct nccl_operation *operations,
                                int nOperations, bool hasProxies, void *foreign);
const char *nccl_profiled_finalize(struct nccl_profiled *comm);

/* A field of an event as it lies in memory; what names fields is in the .c file. */
uint64_t nccl_event_number(int version, const void *event, const char *field);
const char *nccl_event_text(int version, const void *event, const char *field);

#endif
