/* UltraEP balancer: from a load matrix to a plan. Pure C: no allocation, no I/O, no clock, no global state.
 *
 * Words: an assignment is one (token, k) pair; loads, quotas and rank loads count assignments. Expert e's
 * master lives on rank e / (E/R) and never moves. A rank has S slots, each with room for one replica of an
 * expert. An instance is a master or a replica. A domain is D consecutive ranks; replicas stay in their
 * master's domain.
 *
 * Thread rules: every function may be called from any thread; one workspace serves one call at a time.
 */
#ifndef ULTRAEP_BALANCER_H_
#define ULTRAEP_BALANCER_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define ULTRAEP_API __attribute__((visibility("default")))
#else
#define ULTRAEP_API
#endif

/* Result codes; 0..8 have the numeric values of ncclResult_t (nccl.h of NCCL 2.30). */
typedef enum {
  ultraepSuccess = 0,
  ultraepUnhandledCudaError = 1, /* a CUDA call failed */
  ultraepSystemError = 2,        /* memory, threads or another call to the system failed */
  ultraepInternalError = 3,      /* a defect of this library */
  ultraepInvalidArgument = 4,    /* one argument is out of its documented range */
  ultraepInvalidUsage = 5, /* arguments that are each fine but do not go together, or a call out of order */
  ultraepRemoteError = 6,  /* another rank aborted, left or failed */
  ultraepInProgress = 7,   /* enqueued, not finished */
  ultraepTimeout = 8,      /* a rank did not come within timeoutMs */
  ultraepCapacityExceeded = 64 /* the plan needs more rows on some rank than the group has room for */
} ultraepResult_t;

#define ULTRAEP_MAX_RANKS 1024
#define ULTRAEP_MAX_EXPERTS 4096
#define ULTRAEP_MAX_SLOTS 64
#define ULTRAEP_MAX_TOPK 32
#define ULTRAEP_MAX_TOLERANCE_PPM 1000000000u       /* a thousand times the mean */
#define ULTRAEP_MAX_ROW_PS 4194303u                 /* 4.19 us a row */
#define ULTRAEP_MAX_COPY_PS UINT64_C(1000000000000) /* one second a copy */
#define ULTRAEP_MAX_REPLICA_ROWS 1048576            /* rows' worth of a replica */

/* What the planner needs to know of the group. Integers only, so that host and device agree to the bit. */
typedef struct {
  int32_t nRanks;        /* R, 1..1024 */
  int32_t nExperts;      /* E, a multiple of R, R..4096 */
  int32_t nSlots;        /* S, 0..64 replicas a rank can hold */
  int32_t nDomainRanks;  /* D, a divisor of R; 0 means R */
  uint32_t tolerancePpm; /* stop at mean * (1 + tolerancePpm / 1e6) rounded down, or the mean rounded up */
  /* Cost gate: the plan minimises rowPs * (maximum rank load, with replicaRows) + copyPs * (expert copies
   * over the busiest link), see ultraepPlanCost_t. copyPs = 0 switches the gate off. */
  uint32_t rowPs;      /* picoseconds one assignment costs the rank that gets it, 0..ULTRAEP_MAX_ROW_PS */
  uint64_t copyPs;     /* picoseconds to copy one expert's weights over one link, 0..ULTRAEP_MAX_COPY_PS */
  int32_t relayCopies; /* 0: a master sends every replica itself; 1: replicas relay, a rank sends each expert
                          once */
  /* What a replica costs the rank that hosts it besides its rows, in rows' worth of time,
   * 0..ULTRAEP_MAX_REPLICA_ROWS. While planning, a rank's load is its assignments and replicaRows for every
   * replica on it: the plan makes the largest such load small, and a slot is used only where its replica
   * leaves room for an assignment below the target. 0: assignments alone. */
  int32_t replicaRows;
} ultraepPlannerConfig_t;

typedef struct {
  int32_t expert;
  int32_t rank;
  int32_t slot;     /* -1 for a master, else 0..S-1 on its rank */
  int32_t reserved; /* 0 */
  int64_t quota;    /* assignments of the expert that this instance takes; 0 is possible for a master */
} ultraepInstance_t;

/* One step of the decomposition: `count` assignments of source rank `src` go to instance `instance`. */
typedef struct {
  int32_t src;
  int32_t instance; /* index into instances[] */
  int32_t count;    /* > 0 */
} ultraepPiece_t;

/* A plan. All pointers lie in the workspace given to ultraepPlannerRun and live until it is used again or
 * freed.
 *
 * instances[0..E-1] are the masters, instances[e] expert e's; replicas follow, sorted by (rank, slot), and on
 * one rank slots are filled from 0 in order of expert. For expert e, replicaIndex[replicaFirst[e] ..
 * replicaFirst[e+1]) are the indices of its replicas, ascending. pieces[pieceFirst[e] .. pieceFirst[e+1])
 * decompose the quotas of a replicated expert by source: sorted by source; within one source the instance on
 * the source's own rank first, then the master, then replicas ascending. The source's assignments of e, in
 * order of (token, k), go to its pieces in that order. An expert without replicas has no pieces: all sources
 * send everything to its master.
 *
 * Loads and quotas, maxPlanned and bound are assignments, whatever config.replicaRows says; only target
 * counts replicas' worth, too. With replicaRows the largest load with replicas' worth is at most maxBefore:
 * no plan is worse than none. */
typedef struct {
  int32_t nRanks, nExperts, nSlots;
  int32_t nInstances; /* E + nReplicas */
  int32_t nReplicas;
  int32_t maxRankIn;                  /* most replicas received by one rank */
  int32_t maxFanout;                  /* most replicas made of one expert */
  int32_t maxRankOut;                 /* most replicas whose masters are on one rank */
  const ultraepInstance_t *instances; /* [nInstances] */
  const int32_t *replicaFirst;        /* [E+1] */
  const int32_t *replicaIndex;        /* [nReplicas] */
  const int32_t *slotInstance;        /* [R*S] instance in each slot, -1 where empty */
  const int32_t *pieceFirst;          /* [E+1] */
  const ultraepPiece_t *pieces;       /* [pieceFirst[E]] */
  const int64_t *expertLoad;          /* [E] sum over sources */
  const int64_t *rankLoadBefore;      /* [R] with masters only */
  const int64_t *rankLoad;            /* [R] with this plan */
  int64_t total;                      /* all assignments */
  int64_t maxBefore;                  /* max of rankLoadBefore */
  int64_t maxPlanned;                 /* max of rankLoad */
  int64_t target;           /* asked of the plan (tolerance, cost gate); a load with replicas' worth */
  int64_t bound;            /* no plan for this matrix has a smaller maximum */
  int64_t localAssignments; /* assignments whose instance is on their source's rank */
} ultraepPlan_t;

/* Bytes of workspace that ultraepPlannerRun needs for this config (any loads). The workspace must be aligned
 * to 16. Errors: ultraepInvalidArgument (null pointer, field out of range). *bytes is set only on success. */
ULTRAEP_API ultraepResult_t ultraepPlannerWorkspaceSize(const ultraepPlannerConfig_t *config, size_t *bytes);

/* Plans. loads is C[src][e], row-major [R][E]: the assignments that source rank src has for expert e, each >=
 * 0, a row's sum at most 2^31-1. Same input, same plan, on every machine. *plan is set only on success.
 * Errors: ultraepInvalidArgument (null pointer, field or load out of range, workspace too small or
 * misaligned). */
ULTRAEP_API ultraepResult_t ultraepPlannerRun(const ultraepPlannerConfig_t *config, const int32_t *loads,
                                              void *workspace, size_t workspaceBytes, ultraepPlan_t *plan);

/* Sets load[r] to the assignments that rank r really gets: from the pieces for replicated experts, from the
 * loads for the others. Equals plan->rankLoad; a check for tools and tests. load holds R values. */
ULTRAEP_API ultraepResult_t ultraepPlanRealised(const ultraepPlan_t *plan, const int32_t *loads,
                                                int64_t *load);

/* ---- what a plan costs ----
 *
 * Estimates, in picoseconds, of two things that a microbatch waits for: the rows of the busiest rank, and the
 * weights of the replicas. They know nothing of caches, other traffic, launches, or work that runs beside the
 * copies. */

/* What the cost gate minimises, for one plan. */
typedef struct {
  int32_t copies;    /* expert copies over the busiest link: the most that one rank receives or has to send of
                        its masters, with config.relayCopies each of these once (what it passes on of others'
                        weights is not counted, see ultraepPlanRelay) */
  int32_t reserved;  /* 0 */
  uint64_t rowsPs;   /* config.rowPs * (plan->rankLoad + config.replicaRows a replica, of the busiest rank) */
  uint64_t copiesPs; /* config.copyPs * copies */
} ultraepPlanCost_t;
/* Sets *cost for any plan of a problem of config's sizes, whether its rates or others made it. Errors:
 * ultraepInvalidArgument (null pointer, field out of range). */
ULTRAEP_API ultraepResult_t ultraepPlanCost(const ultraepPlannerConfig_t *config, const ultraepPlan_t *plan,
                                            ultraepPlanCost_t *cost);

/* The relay: on which way weights reach replicas, so that a master need not send each replica a copy. An
 * expert's weights go along a chain: from its master to its first replica, from there to the second, and so
 * on; a rank passes a tile on while it receives later ones. The chain's order is that of own(rank of the
 * replica) ascending, equals by rank, own(r) being the number of experts that have replicas and whose masters
 * are on rank r. Why: every rank must send each of its own such experts once; whoever has none passes on for
 * the others, and since the last of a chain sends nothing, ranks with much to send of their own come last.
 *
 * Sets source[i], for replica instances[E + i], to the instance that its weights come from, a master or the
 * replica before it. Same plan, same chains on every machine. source holds nReplicas values. Errors:
 * ultraepInvalidArgument (null pointer). */
ULTRAEP_API ultraepResult_t ultraepPlanRelay(const ultraepPlan_t *plan, int32_t *source);

/* A rank's link, the same in both directions at once and for every rank. */
typedef struct {
  uint64_t copyPs; /* one expert's weights over it, 0..ULTRAEP_MAX_COPY_PS */
  uint64_t tilePs; /* one tile, the amount that is passed on in one go, 0..copyPs */
  uint64_t hopPs;  /* from a tile's arrival until its receiver can use it, 0..ULTRAEP_MAX_COPY_PS */
} ultraepLink_t;

typedef struct {
  int32_t maxSends, sender;      /* most expert copies that one rank sends, and the lowest such rank */
  int32_t maxReceives, receiver; /* the same for receiving */
  int32_t depth;                 /* most transfers from a master to one of its replicas */
  int32_t reserved;              /* 0 */
  uint64_t floorPs;              /* the busiest link alone: no schedule of these transfers is faster */
  uint64_t ps;                   /* until the last replica has its weights, see below */
} ultraepCopies_t;
/* Sets *copies for transfers from source (as of ultraepPlanRelay; null: every replica straight from its
 * master) that all start at once and share links fairly. ps is then an upper bound, and what it takes where
 * no rank sends or receives more than one copy: over the replicas the largest
 *   max(k) * copyPs + (sum(k) - max(k)) * tilePs + transfers * hopPs
 * along the way from the master, k of a transfer being the larger of what its sender sends and its receiver
 * receives. Errors: ultraepInvalidArgument (null pointer, field out of range, a source that is no instance of
 * the same expert or that leads to no master). */
ULTRAEP_API ultraepResult_t ultraepPlanCopies(const ultraepPlan_t *plan, const int32_t *source,
                                              const ultraepLink_t *link, ultraepCopies_t *copies);

/* A one-line reason for the last ultraepInvalidArgument of a config: which field, and its range. Never null.
 */
ULTRAEP_API const char *ultraepPlannerConfigError(const ultraepPlannerConfig_t *config);

#ifdef __cplusplus
}
#endif
#endif
