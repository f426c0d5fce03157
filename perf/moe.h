/* ultraep_moe: times a whole Mixture-of-Experts layer, forward and backward.
 *
 * Per rank and layer, h = hidden, i = inter, n rows received:
 *
 *   forward   route, weights of the replicas, dispatch x -> X[n][h]
 *             GU = X W1^T [n][2i] (gate, up),  A = silu(gate) * up [n][i],  Y = A W2^T [n][h]
 *             combine: out_t = sum over k of w_tk * Y_tk
 *   backward  dispatch dOut on the same route, dY = w * dOut [n][h]
 *             dA = dY W2,  dW2 += dY^T A,  dGU from dA, gate and up,  dW1 += dGU^T X,  dX = dGU W1 [n][h]
 *             combine: dx_t = sum over k of dX_tk; replicas' dW into the masters'
 *
 * W1[2i][h], W2[h][i] and all rows are bfloat16, dW1 and dW2 fp32. The gradient of the weights w, which the
 * router needs, is left out. With several layers, layer l + 1 takes out of layer l as x, and the backward
 * pass fetches a layer's replicas once more, since all layers share the slots.
 *
 * What is common to ultraep_perf (threads, processes, groups, GPUs) is used through bench_run.h.
 */
#ifndef ULTRAEP_PERF_MOE_H_
#define ULTRAEP_PERF_MOE_H_

#include "bench_run.h"

enum { MOE_TENSORS = 2, MOE_MAX_LAYERS = 64, MOE_MAX_STREAMS = 4, MOE_PIECE_ALIGN = 128 };

typedef enum { MOE_GEMM_EACH, MOE_GEMM_GROUPED } moeGemmMode_t;
extern const char *const moeGemmModes[2];
extern const char *const moeGradsModes[2]; /* by ultraepGradsMode_t */
/* What becomes of a slot's gradients when they are added: as products write them anew, they may stay. */
typedef enum { MOE_SLOTS_LEAVE, MOE_SLOTS_CLEAR } moeSlotGrads_t;
extern const char *const moeSlotGrads[2];

typedef struct {
  benchOptions_t bench;
  int32_t inter, nLayers;
  int32_t gemm;      /* moeGemmMode_t, CUDA only */
  int32_t nStreams;  /* of products one by one, CUDA only */
  int32_t pieceRows; /* most of one product, a multiple of MOE_PIECE_ALIGN; 0: any number */
  int32_t overlap;   /* weights and gradients of replicas move beside products */
  int32_t ideal;     /* workloadIdeal_t */
  int32_t gradsMode; /* ultraepGradsMode_t: the order */
  int32_t slotGrads; /* moeSlotGrads_t */
  int32_t gate;
  int32_t expertCtas;                                   /* of the config */
  double linkBytesPerSecond, rowSeconds, expertSeconds; /* for the gate; 0: the library's */
} moeOptions_t;

typedef enum {
  MOE_UNBALANCED, /* masters only */
  MOE_BALANCED,
  MOE_IDEAL, /* as many tokens, with experts dealt or drawn so that all get the same */
  MOE_KINDS
} moeKind_t;
extern const char *const moeKindNames[MOE_KINDS];

typedef enum {
  MOE_ROUTE,
  MOE_WEIGHTS,
  MOE_DISPATCH,
  MOE_MLP,
  MOE_COMBINE,
  MOE_DISPATCH_BACK,
  MOE_MLP_BACK,
  MOE_COMBINE_BACK,
  MOE_GRADS,
  MOE_TOTAL,
  MOE_PHASES
} moePhase_t;
extern const char *const moePhaseNames[MOE_PHASES];

/* How far what was compared is apart, as ||a - b|| / ||b||, the worst of all ranks; 0: equal to the bit. */
typedef struct {
  double out, dx, grads;       /* balanced against unbalanced */
  double sampleOut, sampleDx;  /* one token a rank against a calculation in double that knows no ranks */
  double identity;             /* see moe_check.c */
  bool compared, sampled, bad; /* bad: over a limit */
} moeCheck_t;

/* One rank's figures. */
typedef struct {
  int64_t rows, experts;           /* received; those that got some */
  int64_t nanoseconds[MOE_PHASES]; /* medians of the iterations; in exchanges with waits for other ranks */
} moeRankFigures_t;

typedef struct {
  double seconds[MOE_PHASES]; /* medians of the iterations */
  moeRankFigures_t *ranks;    /* [R], freed by moeResultFree */
  double before, after;       /* imbalance */
  int32_t replicas;
  int64_t memoryBytes;  /* all ranks together */
  int64_t replicaBytes; /* of it, what registering experts took */
  double millijoules;   /* of the GPUs, one iteration; below 0: not known */
  moeCheck_t check;
  gateFigures_t gate; /* planner.copyPs 0: there was none */
} moeResult_t;

/* A rank's parts of what the identities compare. */
typedef enum {
  MOE_SUM_DOWN,       /* <dW2, W2> of the last layer */
  MOE_SUM_OUT,        /* <dOut, out> */
  MOE_SUM_OUT_SQUARE, /* sum over tokens of <dOut_t, out_t>^2 */
  MOE_SUM_GATE_UP,    /* <dW1, W1> of the first layer */
  MOE_SUM_IN,         /* <dx, x> */
  MOE_SUM_IN_SQUARE,
  MOE_SUMS
} moeSum_t;

/* Results of an unbalanced run, which others are compared with: those of one rank. */
typedef struct {
  uint16_t *out, *dx;        /* [nTokens][h] */
  float *grads[MOE_TENSORS]; /* [layers][E/R] experts */
} moeReference_t;

typedef struct moeRun moeRun_t;
typedef struct moeRank moeRank_t;

/* C[m][n] = A B or C += A B; A[m][k], or A[k][m] where transposed; B[k][n], or B[n][k]. */
typedef struct {
  int64_t m, n, k;
  const uint16_t *a, *b;
  bool aTransposed, bTransposed;
  void *c;
  bool isWide;     /* c is fp32, else bfloat16 */
  bool accumulate; /* c is added to, else written */
} moeGemm_t;

/* What the ranks compute with. 0, or -1 and the failure recorded. Works on a GPU are enqueued. */
typedef struct {
  /* On the rank's thread, before ranks meet; close frees what open made, as far as it came. */
  int (*open)(moeRank_t *rank);
  void (*close)(moeRank_t *rank);
  /* to[count] = moeValue * scale; done on return. */
  int (*valuesFill)(moeRank_t *rank, uint16_t *to, int64_t count, uint64_t seed, float scale);
  /* Takes the time; waits for all that was enqueued, and sets markTimes[0..count) (seconds). */
  int (*mark)(moeRank_t *rank, int32_t index);
  int (*marksRead)(moeRank_t *rank, int32_t count);
  /* The segments of a layer's route, in this program's memory: asked for on a stream, and waited for. */
  int (*segmentsAsk)(moeRank_t *rank, int32_t layer, cudaStream_t stream);
  int (*segmentsTake)(moeRank_t *rank, int32_t layer);
  int (*gemms)(moeRank_t *rank, const moeGemm_t *gemms, int32_t count);
  /* Between them, what is enqueued on rank->side follows what was enqueued before the first, and runs beside
   * what follows it until the second. */
  int (*sideBegin)(moeRank_t *rank);
  int (*sideEnd)(moeRank_t *rank);
  /* Row r of rows[count][h] times weights[r]. */
  int (*rowsScale)(moeRank_t *rank, uint16_t *rows, const float *weights, int64_t count);
  int (*swiglu)(moeRank_t *rank, const uint16_t *gateUp, uint16_t *act, int64_t count);
  /* gateUp becomes its gradient. */
  int (*swigluBack)(moeRank_t *rank, uint16_t *gateUp, const uint16_t *actGrad, int64_t count);
  /* Energy that the rank's GPU has used so far, millijoules; 0 where another rank counts it, below 0: not
   * known. Null: none. */
  int64_t (*energy)(moeRank_t *rank);
} moeOps_t;
extern const moeOps_t moeHostOps;
extern const moeOps_t moeCudaOps;

typedef struct {
  ultraepRoute_t route;
  ultraepSegments_t segments; /* arrays in this program's memory */
  /* symmetric memory */
  uint16_t *rows;                 /* [maxRows][h] X, then dX */
  float *rowWeights;              /* [maxRows] */
  uint16_t *weights[MOE_TENSORS]; /* [E/R] masters */
  /* the rank's own */
  uint16_t *gateUp;          /* [ownRows][2i], then its gradient */
  uint16_t *act;             /* [ownRows][i] */
  float *grads[MOE_TENSORS]; /* [E/R] masters' */
} moeLayer_t;

struct moeRank {
  benchRank_t *base;
  void *device;                 /* what the operations keep */
  cudaStream_t side;            /* see sideBegin */
  moeLayer_t *layers;           /* [layers] */
  int64_t ownRows;              /* the most this rank receives */
  uint16_t *rowsOut;            /* symmetric [maxRows][h] Y, then dY */
  uint16_t *actGrad;            /* [ownRows][i] */
  uint16_t *x, *outGrad;        /* [nTokens][h] */
  uint16_t *out[2], *inGrad[2]; /* [nTokens][h], layers take turns */
  int32_t *topk;
  float *topkWeights;     /* where the rank lives */
  float *hostTopkWeights; /* the same in this program's memory */
  moeGemm_t *gemms;       /* [segments] */
  void **owned;           /* own memory, to be freed */
  int32_t nOwned;
  int64_t ownBytes; /* of it, and of symmetric memory */
  /* one iteration: phase i runs from mark i to mark i + 1 */
  int32_t nMarks;
  uint8_t *markPhases; /* [marks] */
  double *markTimes;   /* [marks] */
  double seconds[MOE_PHASES];
  double *kept[MOE_PHASES]; /* [iterations] seconds */
  bool stopped;             /* another rank has failed, which all have been told */
  /* results */
  int64_t energy, memoryBytes, replicaBytes;
  int32_t nExperts; /* with rows, of the first layer */
  moeCheck_t check;
  double sums[MOE_SUMS];
};

struct moeRun {
  benchRun_t base; /* first: a benchRun_t of the run is the run */
  const moeOptions_t *options;
  const moeOps_t *ops;
  moeKind_t kind;
  moeReference_t *references;  /* [local ranks] filled by the unbalanced run, read by the balanced one */
  moeRank_t *ranks;            /* [local ranks] */
  double *seconds[MOE_PHASES]; /* [iterations] */
  /* All ranks do one phase after another, none ahead: in the first iteration, in which GPU code is loaded. */
  bool inStep;
};

static inline moeRun_t *moe_run(const moeRank_t *rank) {
  return (moeRun_t *)rank->base->run;
}
static inline const moeOptions_t *moe_options(const moeRank_t *rank) {
  return moe_run(rank)->options;
}
static inline moeRank_t *moe_rank(const benchRank_t *base) {
  return &((moeRun_t *)base->run)->ranks[base->local];
}
/* Whether replicas' weights and gradients move beside the products. */
static inline bool moe_overlaps(const moeRank_t *rank) {
  return rank->base->run->balance && moe_options(rank)->overlap;
}
/* Marks of an iteration: ten phases of a layer at most, and the end. */
static inline size_t moe_max_marks(const moeOptions_t *options) {
  return 10 * (size_t)options->nLayers + 1;
}
/* Elements of a tensor of one expert. */
static inline int64_t moe_tensor_count(const moeOptions_t *options, int tensor) {
  return (int64_t)(2 - tensor) * options->inter * options->bench.hidden;
}
static inline int32_t moe_experts_per_rank(const moeRank_t *rank) {
  const workload_t *workload = rank->base->run->workload;
  return workload->nExperts / workload->nRanks;
}
static inline int64_t moe_token_values(const moeRank_t *rank) {
  return (int64_t)rank->base->run->workload->nTokens[rank->base->rank] * moe_options(rank)->bench.hidden;
}

/* The contents: a tensor's seed and scale. */
uint64_t moeWeightSeed(int32_t layer, int32_t expert, int tensor);
float moeWeightScale(const moeOptions_t *options, int tensor);
typedef enum { MOE_TOKEN_X, MOE_TOKEN_GRAD, MOE_TOKEN_WEIGHT, MOE_TOKENS } moeToken_t;
uint64_t moeTokenSeed(int32_t rank, moeToken_t what);
extern const float moeTokenScale;

/* Reads the options or exits with PERF_EXIT_USAGE. */
void moeOptionsParse(moeOptions_t *options, int argc, char **argv);

/* ---- moe_run.c ---- */
/* Runs one workload. references [local ranks]: see moeRun_t. Fails on all processes alike. */
int moeRun(const benchOps_t *benchOps, const moeOps_t *ops, const moeOptions_t *options,
           const workload_t *workload, moeKind_t kind, moeReference_t *references, moeResult_t *result,
           perfError_t *error);
void moeResultFree(moeResult_t *result);
int32_t moeLocalRanks(const moeOptions_t *options);
void moeReferencesFree(moeReference_t *references, int32_t count);

/* ---- moe_setup.c: memory and group of a rank ---- */
int moeRankAllocate(moeRank_t *rank);
int moeRankOpenGroup(moeRank_t *rank);
int moeRankFill(moeRank_t *rank);
void moeRankRelease(benchRank_t *base);

/* ---- moe_rank.c ---- */
/* What a rank's thread does. */
void moeRankWork(benchRank_t *base);

/* ---- moe_mlp.c ---- */
int moeMlpForward(moeRank_t *rank, int32_t layer);
/* weightsUnderWay: the replicas', beside the first products. */
int moeMlpBackward(moeRank_t *rank, int32_t layer, bool weightsUnderWay);

/* ---- moe_check.c ---- */
/* After the last iteration: keeps or compares the results, and finds the sums for the identities. */
int moeRankCheck(moeRank_t *rank);
/* ||a - b|| / ||b|| from the squares of both; huge where they are no numbers. */
double moeDistance(double difference, double norm);
/* On one thread, when all ranks have ended: the worst of all ranks of all processes. */
moeCheck_t moeCheckMerge(const moeRun_t *run);
/* In moe_sample.c. */
int moeSampleCheck(moeRank_t *rank);

typedef struct moeReport moeReport_t;
/* All do nothing with a null report. */
int moeReportOpen(moeReport_t **report, const moeOptions_t *options, const benchMachine_t *machine, int argc,
                  char **argv, perfError_t *error);
int moeReportLines(moeReport_t *report, const workload_t *workload, const moeResult_t *results,
                   perfError_t *error);
int moeReportFinish(moeReport_t *report, perfError_t *error);
void moeReportDestroy(moeReport_t *report);

#endif
