/* UltraEP for NCCL: load-aware Mixture-of-Experts all-to-all.
 *
 *   group    the ranks that exchange tokens: an ncclComm_t's, or the threads of a host world
 *   route    one microbatch of one layer: loads -> plan -> row offsets; lives to the end of backward
 *
 * dispatch: tokens -> expert-major rows;  combine: expert-major rows -> tokens
 *
 * A training step of one layer, on every rank:
 *
 *   ultraepRouteUpdate(route, topkIdx, topkWeights, nTokens, stream);        exact loads, plan, offsets
 *   ultraepWeightsSync(route, layer, stream);                                weights of the replicas
 *   ultraepAllToAll(x, rows, ULTRAEP_DISPATCH, route, stream);               rows for the grouped GEMM
 *   ultraepAllToAll(rowsOut, y, ULTRAEP_COMBINE, route, stream);             weighted sum per token
 *   ultraepAllToAll(dy, rowsGrad, ULTRAEP_DISPATCH, route, stream);          backward, same route
 *   ultraepAllToAll(rowsGradIn, dx, ULTRAEP_COMBINE_SUM, route, stream);
 *   ultraepGradsReduce(route, layer, stream);                                replicas' gradients home
 *
 * Row layout on the receiving rank: one segment per local instance, masters by expert, then slots 0..S-1;
 * each segment starts at a multiple of config.alignment rows; inside a segment rows are ordered by source
 * rank, then by (token, k) on that source. The layout depends on data only, never on timing. Rows between
 * segments are padding and are not written.
 *
 * Results. Every call returns a code; ultraepGetLastError() has a message for the calling thread. Arguments
 * are checked before anything is enqueued, written or exchanged. Outputs are set only on success.
 *   ultraepInvalidArgument, ultraepInvalidUsage  the call had no effect; the group works on.
 *   ultraepCapacityExceeded                      this route failed, alike on every rank, before a row
 *                                                moved; the group works on, the route may be updated.
 *   ultraepTimeout, ultraepRemoteError           the group has failed (unless the call says that it works
 *                                                on): this and every later call on it returns this error
 * until it is destroyed. ultraepGroupStatus names phase and rank. Only properties, counters, status,
 * abort and the destroying calls still work. Once a call has returned the error, no peer touches this rank's
 * memory any more.
 *
 * Collective calls (marked so) must be made by every rank of the group, in the same order (those of each
 * lane, see below). Ranks found in different calls, or in one call for different routes, layers or places:
 * ultraepInvalidUsage on all. On one rank, calls on one group must not overlap in time, so not come from two
 * threads at once, whatever their lanes; different groups are independent. Streams: the NCCL backend enqueues
 * on `stream` and returns; the host backend has done the work when the call returns, and ignores `stream`. A
 * lane's calls on several streams must be put in order by the caller, with events.
 *
 * Lanes (NCCL backend; on the host backend nothing overlaps). A group's work is in two lanes, which may run
 * at the same time on two streams: exchanges (ultraepRouteUpdate, ultraepRouteDispatch, ultraepAllToAll,
 * ultraepAllToAllTensors) and experts (ultraepWeightsSync, ultraepGradsReduce). So a sync may start before a
 * dispatch and be joined after it. The caller's events see to the order between the lanes and of other work:
 *
 *   - a sync or a reduction follows the update whose plan it reads, and the route's next update follows it;
 *   - a sync follows what wrote the masters' weights or last read the slots, of whatever route and layer;
 *   - what reads the slots' weights, or writes the masters', follows the sync;
 *   - a reduction follows what wrote the gradients; what reads or writes them next follows the reduction.
 *
 * Thread blocks of both lanes' kernels wait for other ranks, so all of them must fit on the device at the
 * same time: maxCtas + expertCtas, summed over the ranks that share a GPU, at most the SMs that the process
 * may use. Else they may wait for each other until the timeout. Where a device may run one after another what
 * could overlap (the branches of a graph, streams on one hardware queue: CUDA_DEVICE_MAX_CONNECTIONS), both
 * lanes' calls must be enqueued in one order on all ranks. A failure is the group's: it ends the kernels of
 * both lanes, and the status names the call in which it was found. Peers may then still be writing rows of
 * the call that it cut short in the other lane: registered memory is the caller's again once all ranks have
 * destroyed the group. Where ranks differed in a call, the route refuses later calls of the same lane alone,
 * until its next update.
 *
 * Devices (NCCL backend): ultraepGroupCreate wants the communicator's device to be the calling thread's
 * current one. All other calls may come from threads with any current device, and leave it as it was; a null
 * stream is the default stream of the communicator's device.
 *
 * CUDA graphs (NCCL backend): updates, dispatches, combines, syncs and reductions can be captured, and
 * replayed as often as wanted, with other routing in the same arrays, between other calls. Each replay counts
 * as those calls in the order of its streams (a capture may fork for the other lane), on every rank. What a
 * replay meets is told by ultraepGroupStatus. The library does not know of replays: they must have ended
 * before ultraepGroupCounters, ultraepRoutePlan, ultraepMemFree and the destroying calls.
 */
#ifndef ULTRAEP_H_
#define ULTRAEP_H_

#include "ultraep_balancer.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ULTRAEP_VERSION_MAJOR 0
#define ULTRAEP_VERSION_MINOR 1
#define ULTRAEP_VERSION_PATCH 0
#define ULTRAEP_VERSION_CODE                                                                                 \
  (ULTRAEP_VERSION_MAJOR * 10000 + ULTRAEP_VERSION_MINOR * 100 + ULTRAEP_VERSION_PATCH)

/* The same types as in nccl.h and cuda_runtime.h, so that neither is needed here. */
typedef struct ncclComm *ncclComm_t;
typedef struct CUstream_st *cudaStream_t;

typedef struct ultraepGroup *ultraepGroup_t;
typedef struct ultraepRoute *ultraepRoute_t;
typedef struct ultraepHostWorld *ultraepHostWorld_t;

typedef enum {
  ULTRAEP_BFLOAT16 = 0,
  ULTRAEP_FLOAT16 = 1,
  ULTRAEP_FLOAT32 = 2,
  ULTRAEP_FLOAT8 = 3,           /* any 8-bit float; dispatch only, its scales travel as scaleBytes per row */
  ULTRAEP_BYTES = 4,            /* raw rows of `hidden` bytes; dispatch only */
  ULTRAEP_DATATYPE_DEFAULT = -1 /* in arguments: the group's dataType */
} ultraepDataType_t;

typedef enum {
  ULTRAEP_DISPATCH = 0, /* tokens [nTokens][hidden] -> rows [rows][hidden] */
  ULTRAEP_COMBINE =
      1, /* rows -> tokens: sum over k of topkWeights * row; plain sum where the route has no weights */
  ULTRAEP_COMBINE_SUM =
      2 /* rows -> tokens: plain sum over k, for weights applied elsewhere and for input gradients */
} ultraepDirection_t;

typedef enum {
  /* Chosen when the group is made; both modes give bitwise the same rows. ONCE on the NCCL backend where
   * the link (config.linkBytesPerSecond, or 360e9 where every rank has a GPU of its own) is so far below a
   * GPU's memory that sending less over it is worth the copies at the destination, at maxTokens tokens; else
   * DIRECT. */
  ULTRAEP_DISPATCH_AUTO = 0,
  ULTRAEP_DISPATCH_DIRECT = 1, /* every row straight to its place */
  ULTRAEP_DISPATCH_ONCE =
      2 /* one row per (token, destination rank) over the link, copied on at the destination */
} ultraepDispatchMode_t;

typedef enum {
  /* Accumulates in fp32 from +0 in order of k, each product rounded to fp32 (no fused multiply-add), and
   * rounds once to the data type. */
  ULTRAEP_COMBINE_EXACT = 0,
  /* Partial sums at the experts' rank: for each token and other rank the weighted rows there are summed in
   * fp32 in order of k and, where there are two or more, rounded to the data type; the token's rank adds
   * them, in order of their first k, and the rows on itself in fp32 and rounds once. So up to one more
   * rounding per (token, other rank) than EXACT. Combining FLOAT32 needs a group whose dataType is FLOAT32:
   * elsewhere there is no room, ultraepInvalidUsage. */
  ULTRAEP_COMBINE_PARTIAL = 1
} ultraepCombineMode_t;

typedef enum {
  /* As ultraepGradsReduce says: the same bits every time. */
  ULTRAEP_GRADS_ORDERED = 0,
  /* Replicas are added to the master in any order, each sum rounded to the gradient's type: bits may differ
   * from run to run where an expert has two or more replicas. Less waiting: every rank adds its own slots and
   * clears them in the same pass. On GPUs of sm_90 and later, for layers whose gradients are all in symmetric
   * memory; elsewhere ORDERED is done. */
  ULTRAEP_GRADS_UNORDERED = 1,
  /* Added to one of these: slots keep their gradients, and clearing them, one of the four times that a
   * replica's bytes move where an expert has one, is spared. For callers who write a slot's gradients before
   * every reduction instead of adding to what is there: as there are no zeros, a matrix product with beta =
   * 0. */
  ULTRAEP_GRADS_LEAVE = 2
} ultraepGradsMode_t;

/* How ranks reach each other's memory (NCCL backend; the host backend ignores it). Both ways give the same
 * results; they differ in what ultraepMemRegister takes. */
typedef enum {
  /* The environment's ULTRAEP_PEERS (auto, window, ipc) decides; else NCCL's windows where every rank has
   * them (NCCL 2.29 or later, and a communicator with symmetric memory), else CUDA IPC. Ranks agree: one that
   * wishes for a way decides for those that do not; contrary wishes are ultraepInvalidUsage on all. */
  ULTRAEP_PEERS_AUTO = 0,
  ULTRAEP_PEERS_WINDOW = 1, /* NCCL's symmetric windows; ultraepInvalidUsage where there are none */
  /* Any NCCL from 2.19 on: memory mapped by the ranks themselves, by file descriptors that travel over unix
   * sockets (ranks of one machine and one network namespace), by fabric handles where the driver gives them,
   * or by cudaIpc. */
  ULTRAEP_PEERS_IPC = 2
} ultraepPeers_t;

#define ULTRAEP_MAGIC 0x756c6570u /* "ulep" */

#define ULTRAEP_EXPERT_BYTES_REGISTERED (-1) /* config.expertBytes */

/* Initialise with ULTRAEP_CONFIG_INITIALIZER, then set the fields. Must be equal on every rank. */
typedef struct {
  size_t size;    /* sizeof(ultraepConfig_t), from the initializer */
  uint32_t magic; /* ULTRAEP_MAGIC */
  uint32_t version;
  int32_t nExperts;  /* E, a multiple of the number of ranks, 1..4096 */
  int32_t topK;      /* assignments per token, 1..32 */
  int32_t maxTokens; /* most tokens a rank ever passes, 1..2^24 */
  int32_t hidden;   /* elements of a row; a row must be a multiple of 16 bytes, 16 bytes..1 MiB, in every type
                       used */
  int32_t dataType; /* ultraepDataType_t of ultraepAllToAll */
  int32_t scaleBytes;  /* bytes of scales beside each dispatched row, a multiple of 4, 0..65536; 0: none */
  int32_t nSlots;      /* S, replicas a rank can hold, 0..64; 0: no balancing */
  int32_t balance;     /* 1: plan replicas; 0: masters only, whatever nSlots says */
  int32_t domainRanks; /* D, ranks that reach each other's memory, a divisor of the ranks; 0: found by the
                          backend */
  int32_t alignment;   /* rows at which segments start, 1..4096 */
  /* Capacity: rows a rank may receive, padding included, 0..2^31-1; 0: see ultraepGroupProperties_t. */
  int64_t maxRecvRows;
  double tolerance; /* balance to mean * (1 + tolerance), 0..1000; see replicaRows, too */
  /* Cost gate (see ultraepPlannerConfig_t): fewer replicas, or none, where copying their weights costs more
   * time than it saves. expertBytes: what one copy of an expert moves, bytes, 1..2^40; 0: no gate, plans
   * balance as far as tolerance and replicaRows say; ULTRAEP_EXPERT_BYTES_REGISTERED: what
   * ultraepExpertsRegister registers, and no gate before. Registered weights alone (inference) count as they
   * are; with gradients a row counts three times (forward, and both gradients), and a copy is weights for
   * forward, again for backward, and gradients. */
  int64_t expertBytes;
  /* Rate at which one rank sends. 0: ULTRAEP_DISPATCH_AUTO takes 360e9 where every rank has a GPU of its own,
   * and is DIRECT elsewhere; and the gate takes 400e9, an H100's
   * NVLink in one direction; or, with ULTRAEP_EXPERT_BYTES_REGISTERED on the NCCL backend, the slowest rank's
   * rate, measured once when the first experts are registered (slots of 1 MiB or more), by copies of slots
   * between all ranks at a time. A measured gate leaves no more rows on a rank than maxRecvRows has room for.
   */
  double linkBytesPerSecond;
  double rowSeconds;    /* time one assignment costs its rank; 0: weights / 600e12 (one flop a byte at bf16
                           rates), and the row over the link there and back */
  double expertSeconds; /* for the gate: time that an expert costs its rank however few its rows, 0..1: its
                           weights read and its gradients written. It comes on top of a copy; 0: none */
  int32_t dispatchMode; /* ultraepDispatchMode_t */
  int32_t combineMode;  /* ultraepCombineMode_t */
  int32_t gradsMode;    /* ultraepGradsMode_t: an order, and ULTRAEP_GRADS_LEAVE or not */
  int32_t peers;        /* ultraepPeers_t */
  int32_t maxRoutes;    /* routes alive at once, 1..4096 */
  int32_t maxCtas;      /* thread blocks (SMs) a kernel may use, 0: chosen by the library; host: ignored */
  int32_t expertCtas; /* the same for the kernels of ultraepWeightsSync and ultraepGradsReduce, which may run
                         beside exchanges (see Lanes) and matrix products; 0: as maxCtas */
  int32_t timeoutMs;  /* how long any wait for another rank may last, 1..3600000 */
  /* For plans: what a replica costs the rank that hosts it besides its rows, in rows' worth of time, 0..2^20:
   * its weights that come, more and smaller matrix products, its gradients that go home. The plan then makes
   * the largest of all ranks' rows and replicas' worth small, not of the rows alone, and makes fewer replicas
   * where they would cost their ranks more than they take from others. Measure it as the time of a layer with
   * one more expert and as many rows. As it may leave up to nSlots * replicaRows rows more on a rank, an
   * explicit maxRecvRows must have room for them. 0: rows alone. */
  int32_t replicaRows;
  int32_t reserved[1]; /* 0 */
} ultraepConfig_t;

/* Every field by position, so that C++ compilers take it too: two slots, balanced, one route, 30 s, the rest
 * 0. */
#define ULTRAEP_CONFIG_INITIALIZER                                                                           \
  {                                                                                                          \
    sizeof(ultraepConfig_t), ULTRAEP_MAGIC, ULTRAEP_VERSION_CODE, 0, 0, 0, 0, ULTRAEP_BFLOAT16, 0, 2, 1, 0,  \
        1, 0, 0.0, 0, 0.0, 0.0, 0.0, ULTRAEP_DISPATCH_AUTO, ULTRAEP_COMBINE_EXACT, ULTRAEP_GRADS_ORDERED,    \
        ULTRAEP_PEERS_AUTO, 1, 0, 0, 30000, 0, {                                                             \
      0                                                                                                      \
    }                                                                                                        \
  }

typedef struct {
  int32_t rank, nRanks, nDomainRanks;
  int32_t nLocalInstances; /* E/R + S: segments of a route on this rank, empty slots included */
  /* Rows a rank may receive: config.maxRecvRows, or else twice maxTokens * topK (a balanced rank gets that
   * once when all ranks are full), or with a cost gate or replicaRows once and the rows that these may leave
   * on a rank, by the config's rates and by nSlots * replicaRows, if that is more; plus (E/R + S) *
   * (alignment - 1) for padding, and never more than the worst case. */
  int64_t maxRecvRows;
  int64_t windowBytes;  /* memory of this rank that peers reach: routes, flags, staging; user buffers not
                           counted */
  int64_t privateBytes; /* other memory of this rank */
  int64_t slotBytes; /* memory of the replica slots: weights and gradients; 0 until experts are registered */
} ultraepGroupProperties_t;

/* What went wrong with a group; code ultraepSuccess and empty otherwise. */
typedef struct {
  ultraepResult_t code;
  int32_t missingRank; /* the rank that did not come, left or aborted; -1 if none */
  char phase[32];      /* "create", "route", "dispatch", "combine", "weights", "grads", "memory", ... */
} ultraepStatus_t;

/* Bytes that this rank's calls moved between different ranks since the group was made. Row bytes and scales
 * count, loads, flags and top-k weights do not. */
typedef struct {
  int64_t dispatchBytes; /* written to other ranks */
  int64_t combineBytes;  /* read from other ranks */
  int64_t weightBytes;   /* copied from other ranks' masters (or relays) into this rank's slots */
  int64_t gradBytes;     /* read from other ranks' slots into this rank's masters */
} ultraepCounters_t;

/* ---- messages ---- */
ULTRAEP_API ultraepResult_t ultraepGetVersion(int *version);
/* A code's name in words. Never null. */
ULTRAEP_API const char *ultraepGetErrorString(ultraepResult_t result);
/* The message of the last call of this thread that failed; "" if none did. Valid until this thread's next
 * failure. */
ULTRAEP_API const char *ultraepGetLastError(void);

/* ---- host world: ranks are threads of one process, windows are host memory ---- */
/* nRanks 1..1024. The world must outlive its groups. */
ULTRAEP_API ultraepResult_t ultraepHostWorldCreate(ultraepHostWorld_t *world, int nRanks);
/* ultraepInvalidUsage while a group of the world exists. */
ULTRAEP_API ultraepResult_t ultraepHostWorldDestroy(ultraepHostWorld_t world);

/* ---- groups ---- */
/* Collective over comm. The group keeps using comm, which must outlive it. All ranks must reach each other's
 * memory (config.peers), else ultraepInvalidUsage where they do not, ultraepRemoteError elsewhere. This build
 * may lack the NCCL backend: ultraepInvalidUsage, and a message that says what is missing. */
ULTRAEP_API ultraepResult_t ultraepGroupCreate(ultraepGroup_t *group, ncclComm_t comm,
                                               const ultraepConfig_t *config);
/* Collective over the world's ranks; each thread passes its own rank. Several groups may be made from one
 * world, by every rank in the same order. A config that differs between ranks: ultraepInvalidArgument on all.
 * A rank that does not come within timeoutMs: ultraepTimeout on the others. */
ULTRAEP_API ultraepResult_t ultraepGroupCreateHost(ultraepGroup_t *group, ultraepHostWorld_t world, int rank,
                                                   const ultraepConfig_t *config);
ULTRAEP_API ultraepResult_t ultraepGroupProperties(ultraepGroup_t group,
                                                   ultraepGroupProperties_t *properties);
ULTRAEP_API ultraepResult_t ultraepGroupCounters(ultraepGroup_t group, ultraepCounters_t *counters);
/* What the group's next route asks the planner, the cost gate's rates included (copyPs 0: no gate). With it
 * and a plan, ultraepPlanCost says what the gate weighed. */
ULTRAEP_API ultraepResult_t ultraepGroupPlanner(ultraepGroup_t group, ultraepPlannerConfig_t *planner);
/* The group's error, asynchronous ones included; never blocks. status may be null. */
ULTRAEP_API ultraepResult_t ultraepGroupStatus(ultraepGroup_t group, ultraepStatus_t *status);
/* Makes this group's waits, here and on its peers, return ultraepRemoteError soon. May be called from any
 * thread, also while a call on the group is in progress, but not during ultraepGroupDestroy. The group must
 * still be destroyed. */
ULTRAEP_API ultraepResult_t ultraepGroupAbort(ultraepGroup_t group);
/* Not collective. Frees the group with its routes, registrations and ultraepMemAlloc memory on this rank.
 * Peers that wait for this rank then or later get ultraepRemoteError. Null is allowed. */
ULTRAEP_API ultraepResult_t ultraepGroupDestroy(ultraepGroup_t group);

/* ---- symmetric memory: what peers write (a dispatch's outputs) or read (a combine's input, master weights)
 * ---- */
/* Collective: every rank asks for the same bytes, 1..2^47 (else ultraepInvalidUsage on all). *ptr is aligned
 * to 256 bytes and uninitialised. A rank without the memory gets ultraepSystemError, the others
 * ultraepRemoteError, and the group works on. */
ULTRAEP_API ultraepResult_t ultraepMemAlloc(ultraepGroup_t group, void **ptr, size_t bytes);
/* Collective: registers the caller's memory, the same number of bytes on every rank. The caller keeps
 * ownership and must not free it before ultraepMemFree. Aligned to 16 bytes; on the NCCL backend memory
 * of the communicator's device, and what works with either way to the peers is from ncclMemAlloc, aligned to
 * 4096, at the same offset of the allocation on every rank. With ULTRAEP_PEERS_IPC cudaMalloc's memory will
 * do too, and offsets and alignment beyond 16 do not matter; it must lie in one allocation, and where the
 * group is destroyed without ultraepMemFree, cudaMalloc's must be kept until every rank has destroyed it. */
ULTRAEP_API ultraepResult_t ultraepMemRegister(ultraepGroup_t group, void *ptr, size_t bytes);
/* Collective: frees what ultraepMemAlloc gave, or ends a registration. ptr is the start of the region. Layers
 * whose weights lie in it are no longer registered. On a failed group ultraepGroupDestroy does it. */
ULTRAEP_API ultraepResult_t ultraepMemFree(ultraepGroup_t group, void *ptr);

/* ---- routes ---- */
/* Not a collective wait, but every rank must create and destroy its routes in the same order. */
ULTRAEP_API ultraepResult_t ultraepRouteCreate(ultraepGroup_t group, ultraepRoute_t *route);
ULTRAEP_API ultraepResult_t ultraepRouteDestroy(ultraepRoute_t route);
/* Collective. topkIdx [nTokens][topK]: global experts, -1 for an unused entry, in any order; an expert may
 * repeat. topkWeights [nTokens][topK] or null (plain sums), the same choice on every rank. nTokens
 * 0..maxTokens and may differ by rank; with 0 the pointers may be null. Both arrays must stay unchanged until
 * the call's work is done; the route keeps copies. An entry outside -1..E-1 fails the route:
 * ultraepInvalidArgument on that rank, ultraepRemoteError on the others, and the group works on. Fails with
 * ultraepCapacityExceeded where the plan needs more than maxRecvRows on any rank (on the NCCL backend this
 * and the bad entry are found later, by ultraepGroupStatus and by the calls that use the route). */
ULTRAEP_API ultraepResult_t ultraepRouteUpdate(ultraepRoute_t route, const int32_t *topkIdx,
                                               const float *topkWeights, int nTokens, cudaStream_t stream);

#define ULTRAEP_MAX_TENSORS 8

/* The segments of this rank, one per local instance: E/R masters, then S slots. Arrays are owned by the
 * route, live on the group's device (host memory for the host backend), keep their addresses for the life of
 * the route, and hold what the last ultraepRouteUpdate (in stream order) wrote. They are cudaMallocAsync's
 * memory: other devices have no access, and cudaMemcpyAsync wants the group's device current. */
typedef struct {
  int32_t nSegments;       /* E/R + S, always */
  const int32_t *expert;   /* [nSegments] global expert, -1 for an empty slot */
  const int64_t *firstRow; /* [nSegments] */
  const int64_t *rows;     /* [nSegments] rows of the segment, 0 for an empty slot */
  /* [1] Rows in use: the end of the last segment, rounded up to alignment like every segment's. */
  const int64_t *totalRows;
  /* [nSegments] per tensor: where that instance's weights (gradients) are: in the masters of the layer of the
   * last ultraepWeightsSync on this route, or in the slots. Null pointers before that call. An empty slot's
   * pointer is memory of undefined contents. */
  void *const *weights[ULTRAEP_MAX_TENSORS];
  void *const *grads[ULTRAEP_MAX_TENSORS];
} ultraepSegments_t;
ULTRAEP_API ultraepResult_t ultraepRouteSegments(ultraepRoute_t route, ultraepSegments_t *segments);
/* A host copy of the plan, for inspection; may wait for the stream of the last update. Pointers live until
 * the next call of this function, ultraepRouteUpdate or ultraepRouteDestroy on the route. */
ULTRAEP_API ultraepResult_t ultraepRoutePlan(ultraepRoute_t route, ultraepPlan_t *plan);

/* ---- the exchange ---- */
/* Collective. ULTRAEP_DISPATCH: sendbuff [nTokens][hidden] anywhere, recvbuff [maxRecvRows][hidden] in
 * symmetric memory. ULTRAEP_COMBINE and ULTRAEP_COMBINE_SUM: sendbuff [maxRecvRows][hidden] in symmetric
 * memory, recvbuff [nTokens][hidden] anywhere. The symmetric buffer must lie at the same offset of the same
 * region on every rank (else ultraepInvalidUsage on all) and leave room for maxRecvRows rows (else
 * ultraepInvalidArgument). Buffers are aligned to 16 bytes and do not overlap. Combining writes a token
 * without assignments as zeros. When the call's work is done on a rank, its outputs are whole and no peer
 * reads or writes its symmetric buffer any more. ultraepInvalidUsage: the route holds no plan (never updated,
 * or its update failed); a combine of FLOAT8 or BYTES; a group with scaleBytes (use ultraepAllToAllTensors).
 */
ULTRAEP_API ultraepResult_t ultraepAllToAll(const void *sendbuff, void *recvbuff,
                                            ultraepDirection_t direction, ultraepRoute_t route,
                                            cudaStream_t stream);

typedef struct {
  size_t size;
  uint32_t magic;
  uint32_t version;
  int32_t dataType;     /* ultraepDataType_t; may differ between calls: fp8 out, bf16 back */
  int32_t reserved;     /* 0 */
  const void *sendbuff; /* as for ultraepAllToAll */
  void *recvbuff;
  const void
      *sendScales; /* dispatch: [nTokens][scaleBytes], or null: no scales in this call; combine: null */
  void *
      recvScales; /* dispatch: [maxRecvRows][scaleBytes] in symmetric memory; null exactly if sendScales is */
  float *recvWeights; /* dispatch: [maxRecvRows] the rows' top-k weights (1 where the route has none), in
                         symmetric memory, or null; combine: null */
} ultraepTensors_t;
#define ULTRAEP_TENSORS_INITIALIZER                                                                          \
  {                                                                                                          \
    sizeof(ultraepTensors_t), ULTRAEP_MAGIC, ULTRAEP_VERSION_CODE, ULTRAEP_DATATYPE_DEFAULT, 0, 0, 0, 0, 0,  \
        0                                                                                                    \
  }
/* Collective. ultraepAllToAll with scales, rows' weights and a data type of the call's own. A rank without
 * tokens passes the same outputs as the others. */
ULTRAEP_API ultraepResult_t ultraepAllToAllTensors(const ultraepTensors_t *tensors,
                                                   ultraepDirection_t direction, ultraepRoute_t route,
                                                   cudaStream_t stream);
/* Collective. ultraepRouteUpdate and the dispatch on it, as one call on all ranks: the same results, errors
 * and rules, where the NCCL backend launches one kernel in which the ranks meet once less. That counts with
 * few tokens. An update that fails moves no row. */
ULTRAEP_API ultraepResult_t ultraepRouteDispatch(ultraepRoute_t route, const int32_t *topkIdx,
                                                 const float *topkWeights, int nTokens,
                                                 const ultraepTensors_t *tensors, cudaStream_t stream);

/* ---- replicas' weights and gradients ---- */
typedef struct {
  /* [E/R][bytes], aligned to 16. Weights: symmetric memory, at the same offset of the same region on every
   * rank. Gradients: any memory of this rank; where all of a layer's are symmetric memory, at the same places
   * on every rank, the ranks that hold an expert's replicas share the work of adding, with the same bits as
   * result. A layer ends with the symmetric memory that holds any of its tensors. */
  void *master;
  size_t bytes;     /* of one expert, a multiple of 16; equal in every layer and on every rank */
  int32_t dataType; /* weights: ignored (copied as bytes); gradients: ULTRAEP_FLOAT32 or ULTRAEP_BFLOAT16 */
  int32_t reserved; /* 0 */
} ultraepExpertTensor_t;

typedef struct {
  size_t size;
  uint32_t magic;
  uint32_t version;
  int32_t nWeights; /* 1..ULTRAEP_MAX_TENSORS; quantised weights and their scales are two tensors */
  int32_t nGrads;   /* 0..ULTRAEP_MAX_TENSORS; 0: inference */
  ultraepExpertTensor_t weights[ULTRAEP_MAX_TENSORS];
  ultraepExpertTensor_t grads[ULTRAEP_MAX_TENSORS];
} ultraepExperts_t;
#define ULTRAEP_EXPERTS_INITIALIZER                                                                          \
  {                                                                                                          \
    sizeof(ultraepExperts_t), ULTRAEP_MAGIC, ULTRAEP_VERSION_CODE, 0, 0, {{0, 0, 0, 0}}, {                   \
      { 0, 0, 0, 0 }                                                                                         \
    }                                                                                                        \
  }

/* Collective. Registers (or replaces) a layer's master tensors; layer >= 0 is any number of the caller's. The
 * first registration of a group allocates the slots, S per rank, shared by all layers; gradient slots start
 * as zeros. Registering other shapes later: ultraepInvalidUsage. A rank without memory for the slots gets
 * ultraepSystemError, the others ultraepRemoteError, and the group works on. */
ULTRAEP_API ultraepResult_t ultraepExpertsRegister(ultraepGroup_t group, int layer,
                                                   const ultraepExperts_t *experts);
/* Collective. Copies the weights of every replica of the route's plan from its master into its slot. When the
 * call's work is done on a rank, its slots are filled and its masters are no longer read. On a stream of its
 * own it may run beside exchanges, also on the same route: see Lanes. */
ULTRAEP_API ultraepResult_t ultraepWeightsSync(ultraepRoute_t route, int layer, cudaStream_t stream);
/* Collective. For every replica of the route's plan: master gradient += slot gradient, summed in fp32 in the
 * order master, then replicas ascending by rank, rounded once; then the slot's gradient is set to zero
 * (config.gradsMode may say otherwise of both). When the call's work is done on a rank, nobody reads its
 * slots any more. On a stream of its own it may run beside exchanges: see Lanes. */
ULTRAEP_API ultraepResult_t ultraepGradsReduce(ultraepRoute_t route, int layer, cudaStream_t stream);

/* ---- the traffic record: what NCCL's own send, receive and all-to-all calls moved ---- */
/* Kept where the library is NCCL's plugin and takes these calls over (see the README), per communicator and
 * rank. A process knows what its own ranks send and receive. */
#define ULTRAEP_TRAFFIC_PAIRS 10
#define ULTRAEP_TRAFFIC_WINDOWS 6

typedef struct {
  int32_t from, to; /* ranks */
  int64_t bytes, calls;
} ultraepTrafficPair_t;

typedef struct {
  double start;      /* seconds since 1970 */
  double seconds;    /* its length: ULTRAEP_TRAFFIC_WINDOW_S, or more where nobody looked in between */
  int64_t sendBytes; /* by this rank */
  int64_t recvBytes;
  double imbalance; /* as below, in this window */
} ultraepTrafficWindow_t;

typedef struct {
  size_t size;
  uint32_t magic;
  uint32_t version;
  /* In: arrays [capacity] by peer, for this rank since its record was opened; any may be null. */
  int64_t *sendBytes;
  int64_t *sendCalls;
  int64_t *recvBytes;
  int64_t *recvCalls;
  int32_t capacity; /* in: at least nRanks where an array is given */
  /* Out: */
  int32_t rank, nRanks;
  int32_t nKnownRanks; /* ranks of the communicator whose records this process has */
  uint64_t hash; /* tells communicators apart; 0: not known, then only this rank's record is looked at */
  int64_t totalSendBytes, totalSendCalls; /* of this rank */
  int64_t totalRecvBytes, totalRecvCalls;
  /* Max over mean, over all nRanks, of what the known ranks sent to each; 0: they sent nothing. With one
   * known rank this is that rank's view: what others send is not known here. */
  double imbalance;
  int32_t nPairs;                                          /* entries of pairs */
  int32_t nWindows;                                        /* entries of windows */
  ultraepTrafficPair_t pairs[ULTRAEP_TRAFFIC_PAIRS];       /* of the known ranks, most bytes first */
  ultraepTrafficWindow_t windows[ULTRAEP_TRAFFIC_WINDOWS]; /* finished ones, the last one first */
} ultraepTraffic_t;
#define ULTRAEP_TRAFFIC_INITIALIZER                                                                          \
  {                                                                                                          \
    sizeof(ultraepTraffic_t), ULTRAEP_MAGIC, ULTRAEP_VERSION_CODE, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,    \
        0.0, 0, 0, {{0, 0, 0, 0}}, {                                                                         \
      { 0.0, 0.0, 0, 0, 0.0 }                                                                                \
    }                                                                                                        \
  }
/* Not collective; any thread, but not during the communicator's destruction. Call it without arrays to learn
 * nRanks. ultraepInvalidArgument: nothing is recorded for comm, or an array is given and capacity is less
 * than nRanks. */
ULTRAEP_API ultraepResult_t ultraepTrafficGet(ncclComm_t comm, ultraepTraffic_t *traffic);

#ifdef __cplusplus
}
#endif
#endif
