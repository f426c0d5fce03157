/* The binary interface between NCCL and a profiler plugin, table versions 1 to 7, after NCCL's public
 * headers.
 *
 * NCCL looks for ncclProfiler_v<N> in the library it opened, newest N first:
 *
 *   table  newest one of    what changed
 *   v1     2.23             codes of NCCL's enums in events
 *   v2     2.24, 2.25       names in place of the codes
 *   v3     2.26             events of kernels' channels and of net plugins
 *   v4     2.27             init is told the communicator's name, id, size and rank; events no longer are
 *   v5     2.28             the type has 64 bits; events of API calls and of kernel launches
 *   v6     2.29, 2.30       events of copy engines
 *   v7     2.31 and later   tags that the program gives its calls; events of phases of kernels
 *
 * init is called once per rank and communicator; startEvent for what the mask asks for, and it gives the
 * event a handle that the other calls are given: null for an event of no interest. Up to 2.27 the events of
 * a group's operations come only if the group's own event has a handle; and up to 2.24 those of sends and
 * receives only if the mask has collectives, too. A result other than success makes no difference to NCCL,
 * but for init's. What a shared proxy of another process does comes with that process's context: such a
 * pointer is not to be followed.
 *
 * NCCL's enums are int here: the same size. */
#ifndef ULTRAEP_NCCL_PROFILER_ABI_H_
#define ULTRAEP_NCCL_PROFILER_ABI_H_

#include "nccl_tuner_abi.h"

#include <stdbool.h>
#include <sys/types.h>

/* Types of events: bits of the activation mask. */
enum {
  NCCL_ABI_EVENT_GROUP = 1 << 0,
  NCCL_ABI_EVENT_COLL = 1 << 1,
  NCCL_ABI_EVENT_P2P = 1 << 2,
  NCCL_ABI_EVENT_PROXY_OP = 1 << 3,
  NCCL_ABI_EVENT_PROXY_STEP = 1 << 4,
  NCCL_ABI_EVENT_PROXY_CONTROL = 1 << 5,
  NCCL_ABI_EVENT_KERNEL_CHANNEL = 1 << 6, /* v3 */
  NCCL_ABI_EVENT_NET_PLUGIN = 1 << 7,
  NCCL_ABI_EVENT_GROUP_API = 1 << 8, /* v5 */
  NCCL_ABI_EVENT_COLL_API = 1 << 9,
  NCCL_ABI_EVENT_P2P_API = 1 << 10,
  NCCL_ABI_EVENT_KERNEL_LAUNCH = 1 << 11,
  NCCL_ABI_EVENT_CE_COLL = 1 << 12, /* v6 */
  NCCL_ABI_EVENT_CE_SYNC = 1 << 13,
  NCCL_ABI_EVENT_CE_BATCH = 1 << 14,
  NCCL_ABI_EVENT_KERNEL_PHASE = 1 << 15 /* v7; NCCL gives it with its kernel's channel alone */
};

/* States of recordEventState that matter here. */
enum {
  NCCL_ABI_STATE_STEP_FIRST = 8, /* to 12: steps of proxies */
  NCCL_ABI_STATE_STEP_LAST = 12,
  NCCL_ABI_STATE_CONTROL_FIRST = 13, /* to 18: what the proxy's thread does */
  NCCL_ABI_STATE_CONTROL_LAST = 18,
  NCCL_ABI_STATE_OP_IN_PROGRESS = 19, /* v4 */
  NCCL_ABI_STATE_STEP_PEER_WAIT = 20,
  NCCL_ABI_STATE_NET_UPDATE = 21,
  NCCL_ABI_STATE_KERNEL_STOP = 22,
  NCCL_ABI_STATE_GROUP_START_STOP = 23, /* v5 */
  NCCL_ABI_STATE_GROUP_END_START = 24,
  NCCL_ABI_STATE_CE_LAST = 30,          /* v6 */
  NCCL_ABI_STATE_KERNEL_PHASE_STOP = 31 /* v7 */
};

/* ncclFunc_t of 2.23. */
enum { NCCL_ABI_FUNCTION_SEND = 6, NCCL_ABI_FUNCTION_RECV = 7 };

/* ---- events ---- */
/* The same in all versions. */
typedef struct {
  pid_t pid; /* of the process whose operation it is */
  uint8_t channel;
  int peer, nSteps, chunkSize, isSend;
} nccl_abi_event_proxy_op_t;

typedef struct {
  uint8_t channel;
  uint64_t startTime; /* on the GPU; v3 has the channel alone */
} nccl_abi_event_kernel_t;

typedef struct {
  int64_t id;
  void *data;
} nccl_abi_event_net_t;

typedef struct {
  uint8_t type;
  void *parent; /* handle */
  int rank;
  union {
    struct {
      const char *name; /* of the communicator */
      uint64_t commHash, sequence;
      uint8_t function;
      const void *send;
      void *recv;
      size_t count;
      int root;
      uint8_t dataType;
      uint32_t op;
      size_t trafficBytes;
      uint8_t nChannels, nWarps, algorithm, protocol;
      int isCollnet, isNvls;
    } coll;
    struct {
      const char *name;
      uint64_t commHash;
      uint8_t function;
      void *buffer;
      uint8_t dataType;
      size_t count;
      int peer;
    } p2p;
    nccl_abi_event_proxy_op_t proxyOp;
    int step; /* of a proxy */
  };
} nccl_abi_event_v1_t;

typedef struct {
  uint8_t type;
  void *parent;
  int rank;
  union {
    struct {
      const char *name;
      uint64_t commHash, sequence;
      const char *function;
      const void *send;
      void *recv;
      size_t count;
      int root;
      const char *dataType;
      size_t trafficBytes;
      uint8_t nChannels, nWarps;
      const char *algorithm, *protocol;
    } coll;
    struct {
      const char *name;
      uint64_t commHash;
      const char *function;
      void *buffer;
      const char *dataType;
      size_t count;
      int peer;
    } p2p;
    nccl_abi_event_proxy_op_t proxyOp;
    int step;
  };
} nccl_abi_event_v2_t;

typedef struct {
  uint8_t type;
  void *parent;
  int rank;
  union {
    struct {
      const char *name;
      uint64_t commHash, sequence;
      const char *function;
      const void *send;
      void *recv;
      size_t count;
      int root;
      const char *dataType;
      uint8_t nChannels, nWarps;
      const char *algorithm, *protocol;
    } coll;
    struct {
      const char *name;
      uint64_t commHash;
      const char *function;
      void *buffer;
      const char *dataType;
      size_t count;
      int peer;
    } p2p;
    nccl_abi_event_proxy_op_t proxyOp;
    int step;
    uint8_t kernelChannel;
    nccl_abi_event_net_t net;
  };
} nccl_abi_event_v3_t;

typedef struct {
  uint8_t type;
  void *parent;
  int rank;
  union {
    struct {
      uint64_t sequence;
      const char *function;
      const void *send;
      void *recv;
      size_t count;
      int root;
      const char *dataType;
      uint8_t nChannels, nWarps;
      const char *algorithm, *protocol;
    } coll;
    struct {
      const char *function;
      void *buffer;
      const char *dataType;
      size_t count;
      int peer;
      uint8_t nChannels;
    } p2p;
    nccl_abi_event_proxy_op_t proxyOp;
    int step;
    nccl_abi_event_kernel_t kernel;
    nccl_abi_event_net_t net;
  };
} nccl_abi_event_v4_t;

/* v5's members, which v6 has, too. */
typedef union {
  struct {
    bool isCaptured;
    int depth;
  } groupApi;
  struct {
    const char *function;
    size_t count;
    const char *dataType;
    int root;
    void *stream;
    bool isCaptured;
  } collApi;
  struct {
    const char *function;
    size_t count;
    const char *dataType;
    void *stream;
    bool isCaptured;
  } p2pApi;
  void *launchStream;
  struct {
    uint64_t sequence;
    const char *function;
    const void *send;
    void *recv;
    size_t count;
    int root;
    const char *dataType;
    uint8_t nChannels, nWarps;
    const char *algorithm, *protocol;
    void *parentGroup; /* what `parent` was up to v4 */
  } coll;
  struct {
    const char *function;
    void *buffer;
    const char *dataType;
    size_t count;
    int peer;
    uint8_t nChannels;
    void *parentGroup;
  } p2p;
  nccl_abi_event_proxy_op_t proxyOp;
  int step;
  nccl_abi_event_kernel_t kernel;
  nccl_abi_event_net_t net;
} nccl_abi_event_facts_v5_t;

typedef struct {
  uint64_t type;
  void *parent;
  int rank;
  nccl_abi_event_facts_v5_t facts;
} nccl_abi_event_v5_t;

typedef struct {
  uint64_t type;
  void *parent;
  int rank;
  union {
    nccl_abi_event_facts_v5_t facts;
    struct {
      uint64_t sequence;
      const char *function;
      const void *send;
      void *recv;
      size_t count;
      int root;
      const char *dataType, *syncStrategy;
      bool syncsInBatch;
      uint32_t batchSize, nBatches, ceSequence;
      void *stream;
    } ceColl;
    struct {
      bool isComplete;
      int nRanks;
    } ceSync;
    struct {
      int nOps;
      size_t nBytes;
      bool syncsInBatch;
    } ceBatch;
  };
} nccl_abi_event_v6_t;

/* v6's members, where they were; behind them what is new. `tag`: the program's, 0: none. */
typedef struct {
  uint64_t type;
  void *parent;
  int rank;
  union {
    nccl_abi_event_facts_v5_t facts;
    struct {
      const char *function;
      size_t count;
      const char *dataType;
      int root;
      void *stream;
      bool isCaptured;
      uint64_t tag;
    } collApi;
    struct {
      const char *function;
      size_t count;
      const char *dataType;
      void *stream;
      bool isCaptured;
      uint64_t tag;
    } p2pApi;
    struct {
      uint64_t sequence;
      const char *function;
      const void *send;
      void *recv;
      size_t count;
      int root;
      const char *dataType;
      uint8_t nChannels, nWarps;
      const char *algorithm, *protocol;
      void *parentGroup;
      const char *kernel; /* of symmetric memory; null: another one */
      bool isSymmetric;
      uint64_t tag;
    } coll;
    struct {
      const char *function;
      void *buffer;
      const char *dataType;
      size_t count;
      int peer;
      uint8_t nChannels;
      void *parentGroup;
      uint64_t tag;
    } p2p;
    struct {
      uint64_t sequence;
      const char *function;
      const void *send;
      void *recv;
      size_t count;
      int root;
      const char *dataType, *syncStrategy;
      bool syncsInBatch;
      uint32_t batchSize, nBatches, ceSequence;
      void *stream;
      uint64_t tag;
    } ceColl;
    struct {
      uint8_t channel, phase;
      const char *name;
      uint64_t startTime; /* on the GPU */
    } kernelPhase;
  };
} nccl_abi_event_v7_t;

/* ---- what comes with a state ---- */
typedef union { /* v1 to v3 */
  struct {
    size_t bytes;
    int nSteps;
  } proxyOp;
  int nAppended; /* operations, to the proxy's list */
} nccl_abi_state_v1_t;

typedef union { /* v4 to v7 */
  size_t stepBytes;
  int nAppended;
  void *netData;
  uint64_t stopTime; /* of a kernel's channel or phase, on the GPU */
} nccl_abi_state_v4_t;

/* ---- the tables ----
 *   context, mask  out. NCCL reads the mask again and again: it may be written at any time
 *   event, state   of the table's version */
typedef struct { /* v1 to v3 */
  const char *name;
  ultraepResult_t (*init)(void **context, int *mask);
  ultraepResult_t (*startEvent)(void *context, void **handle, void *event);
  ultraepResult_t (*stopEvent)(void *handle);
  ultraepResult_t (*recordEventState)(void *handle, int state, void *arguments);
  ultraepResult_t (*finalize)(void *context);
} nccl_abi_profiler_v1_t;

typedef struct {
  const char *name;
  ultraepResult_t (*init)(void **context, int *mask, const char *commName, uint64_t commHash, int nNodes,
                          int nRanks, int rank, nccl_abi_logger_t logger);
  ultraepResult_t (*startEvent)(void *context, void **handle, void *event);
  ultraepResult_t (*stopEvent)(void *handle);
  ultraepResult_t (*recordEventState)(void *handle, int state, void *arguments);
  ultraepResult_t (*finalize)(void *context);
} nccl_abi_profiler_v4_t;

typedef struct { /* v5 to v7 */
  const char *name;
  ultraepResult_t (*init)(void **context, uint64_t commHash, int *mask, const char *commName, int nNodes,
                          int nRanks, int rank, nccl_abi_logger_t logger);
  ultraepResult_t (*startEvent)(void *context, void **handle, void *event);
  ultraepResult_t (*stopEvent)(void *handle);
  ultraepResult_t (*recordEventState)(void *handle, int state, void *arguments);
  ultraepResult_t (*finalize)(void *context);
} nccl_abi_profiler_v5_t;

enum { NCCL_ABI_PROFILER_NEWEST = 7 };

/* ---- layout ---- */
static_assert(sizeof(pid_t) == 4 && sizeof(bool) == 1, "as in NCCL");
static_assert(offsetof(nccl_abi_event_v1_t, rank) == 16 && sizeof(nccl_abi_event_v1_t) == 120, "v1");
static_assert(offsetof(nccl_abi_event_v1_t, p2p.peer) == 72, "v1");
static_assert(sizeof(nccl_abi_event_v2_t) == 128 && offsetof(nccl_abi_event_v2_t, p2p.peer) == 72, "v2");
static_assert(sizeof(nccl_abi_event_v3_t) == 120 && offsetof(nccl_abi_event_v3_t, p2p.peer) == 72, "v3");
static_assert(sizeof(nccl_abi_event_v4_t) == 104 && offsetof(nccl_abi_event_v4_t, p2p.peer) == 56, "v4");
static_assert(sizeof(nccl_abi_event_v5_t) == 112 && offsetof(nccl_abi_event_v5_t, facts.p2p.peer) == 56,
              "v5");
static_assert(sizeof(nccl_abi_event_v6_t) == 112 && offsetof(nccl_abi_event_v6_t, facts.p2p.peer) == 56,
              "v6");
static_assert(offsetof(nccl_abi_event_v6_t, ceColl.stream) == 104, "v6");
static_assert(sizeof(nccl_abi_event_v7_t) == 136 && offsetof(nccl_abi_event_v7_t, p2p.peer) == 56, "v7");
static_assert(offsetof(nccl_abi_event_v7_t, p2p.tag) == 72 && offsetof(nccl_abi_event_v7_t, coll.tag) == 128,
              "v7");
static_assert(offsetof(nccl_abi_event_v7_t, collApi.tag) == 72 &&
                  offsetof(nccl_abi_event_v7_t, p2pApi.tag) == 64 &&
                  offsetof(nccl_abi_event_v7_t, ceColl.tag) == 112,
              "v7");
static_assert(sizeof(nccl_abi_state_v1_t) == 16 && sizeof(nccl_abi_state_v4_t) == 8, "states");
static_assert(sizeof(nccl_abi_profiler_v1_t) == 6 * sizeof(void *) &&
                  sizeof(nccl_abi_profiler_v4_t) == 6 * sizeof(void *) &&
                  sizeof(nccl_abi_profiler_v5_t) == 6 * sizeof(void *),
              "pointers only");

ULTRAEP_API extern const nccl_abi_profiler_v1_t ncclProfiler_v1;
ULTRAEP_API extern const nccl_abi_profiler_v1_t ncclProfiler_v2;
ULTRAEP_API extern const nccl_abi_profiler_v1_t ncclProfiler_v3;
ULTRAEP_API extern const nccl_abi_profiler_v4_t ncclProfiler_v4;
ULTRAEP_API extern const nccl_abi_profiler_v5_t ncclProfiler_v5;
ULTRAEP_API extern const nccl_abi_profiler_v5_t ncclProfiler_v6;
ULTRAEP_API extern const nccl_abi_profiler_v5_t ncclProfiler_v7;

#endif
