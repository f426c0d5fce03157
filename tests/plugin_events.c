#include "plugin_events.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { SLOT_NAME, SLOT_INIT, SLOT_START, SLOT_STOP, SLOT_STATE, SLOT_FINALIZE };
enum { EVENT_BYTES = 144, TYPES = 12, NOT_THERE = -1 };
enum { STATE_CONTROL_IDLE = 13, STATE_OP_IN_PROGRESS = 19, STATE_NET_UPDATE = 21, STATE_KERNEL_STOP = 22 };
enum { STATE_PHASE_STOP = 31 };
enum { STATE_STEP_SEND_WAIT = 9, STATE_GROUP_STARTED = 23, STATE_GROUP_ENDS = 24 };

/* Offsets by version 1 to 7, of NCCL's structs on 64-bit Linux; text: a pointer to a name, else a number of
 * that many bytes. */
struct field {
  const char *name;
  int bytes; /* 0: text from v2 on, 1 byte in v1 */
  int offsets[NCCL_NEWEST_PROFILER];
};
static const struct field fields[] = {
    {"parent", 8, {8, 8, 8, 8, 8, 8, 8}},
    {"rank", 4, {16, 16, 16, 16, 16, 16, 16}},
    {"coll.hash", 8, {32, 32, 32, NOT_THERE, NOT_THERE, NOT_THERE, NOT_THERE}},
    {"coll.sequence", 8, {40, 40, 40, 24, 24, 24, 24}},
    {"coll.function", 0, {48, 48, 48, 32, 32, 32, 32}},
    {"coll.count", 8, {72, 72, 72, 56, 56, 56, 56}},
    {"coll.root", 4, {80, 80, 80, 64, 64, 64, 64}},
    {"coll.type", 0, {84, 88, 88, 72, 72, 72, 72}},
    {"coll.warps", 1, {105, 105, 97, 81, 81, 81, 81}},
    {"coll.protocol", 0, {107, 120, 112, 96, 96, 96, 96}},
    {"coll.group", 8, {NOT_THERE, NOT_THERE, NOT_THERE, NOT_THERE, 104, 104, 104}},
    {"p2p.hash", 8, {32, 32, 32, NOT_THERE, NOT_THERE, NOT_THERE, NOT_THERE}},
    {"p2p.function", 0, {40, 40, 40, 24, 24, 24, 24}},
    {"p2p.buffer", 8, {48, 48, 48, 32, 32, 32, 32}},
    {"p2p.type", 0, {56, 56, 56, 40, 40, 40, 40}},
    {"p2p.count", 8, {64, 64, 64, 48, 48, 48, 48}},
    {"p2p.peer", 4, {72, 72, 72, 56, 56, 56, 56}},
    {"p2p.group", 8, {NOT_THERE, NOT_THERE, NOT_THERE, NOT_THERE, 64, 64, 64}},
    {"op.pid", 4, {24, 24, 24, 24, 24, 24, 24}},
    {"op.steps", 4, {36, 36, 36, 36, 36, 36, 36}},
    {"op.isSend", 4, {44, 44, 44, 44, 44, 44, 44}},
    {"step", 4, {24, 24, 24, 24, 24, 24, 24}},
    {"kernel.channel", 1, {NOT_THERE, NOT_THERE, 24, 24, 24, 24, 24}},
    {"kernel.time", 8, {NOT_THERE, NOT_THERE, NOT_THERE, 32, 32, 32, 32}},
    {"net.id", 8, {NOT_THERE, NOT_THERE, 24, 24, 24, 24, 24}},
    {"coll.tag", 8, {NOT_THERE, NOT_THERE, NOT_THERE, NOT_THERE, NOT_THERE, NOT_THERE, 128}},
    {"p2p.tag", 8, {NOT_THERE, NOT_THERE, NOT_THERE, NOT_THERE, NOT_THERE, NOT_THERE, 72}},
    {"phase.number", 1, {NOT_THERE, NOT_THERE, NOT_THERE, NOT_THERE, NOT_THERE, NOT_THERE, 25}},
    {"phase.name", 8, {NOT_THERE, NOT_THERE, NOT_THERE, NOT_THERE, NOT_THERE, NOT_THERE, 32}},
    {"ce.stream", 8, {NOT_THERE, NOT_THERE, NOT_THERE, NOT_THERE, NOT_THERE, 104, 104}},
};

/* ---- fields ---- */
static const struct field *field_of(const char *name) {
  for (size_t i = 0; i < sizeof(fields) / sizeof(fields[0]); i++) {
    if (strcmp(fields[i].name, name) == 0) return &fields[i];
  }
  fprintf(stderr, "no field %s\n", name);
  _exit(99);
}

static int field_bytes(const struct field *field, int version) {
  if (field->bytes > 0) return field->bytes;
  return version == 1 ? 1 : 8;
}

static uint64_t event_type(int version, const void *event) {
  uint64_t type = 0;

  memcpy(&type, event, version >= 5 ? 8 : 1);
  return type;
}

uint64_t nccl_event_number(int version, const void *event, const char *field) {
  const struct field *found = NULL;
  uint64_t number = 0;

  if (strcmp(field, "type") == 0) return event_type(version, event);
  found = field_of(field);
  if (found->offsets[version - 1] == NOT_THERE) return 0;
  memcpy(&number, (const char *)event + found->offsets[version - 1], (size_t)field_bytes(found, version));
  return number;
}

const char *nccl_event_text(int version, const void *event, const char *field) {
  return (const char *)(uintptr_t)nccl_event_number(version, event, field);
}

static void event_set(int version, void *event, const char *field, uint64_t number) {
  const struct field *found = field_of(field);

  if (found->offsets[version - 1] == NOT_THERE) return;
  memcpy((char *)event + found->offsets[version - 1], &number, (size_t)field_bytes(found, version));
}

static void event_set_text(int version, void *event, const char *field, const char *text, int code) {
  event_set(version, event, field, version == 1 ? (uint64_t)code : (uint64_t)(uintptr_t)text);
}

/* ---- NCCL's names ---- */
static const char *const typeNames[TYPES] = {
    "ncclInt8",    "Unknown",     "ncclInt32",   "ncclUint32",   "ncclInt64",      "ncclUint64",
    "ncclFloat16", "ncclFloat32", "ncclFloat64", "ncclBfloat16", "ncclFloat8e4m3", "ncclFloat8e5m2"};
static const char *const functionNames[] = {"AllReduce", "Send", "Recv"};
static const int functionCodes[] = {4, 6, 7};

int nccl_profiler_types(int version) {
  static const int types[] = {0x3f, 0x3f, 0xff, 0xff, 0xfff, 0x7fff, 0xffff};

  return types[version - 1];
}

bool nccl_profiler_find(void *library, int newest, int oldest, struct nccl_profiler *profiler) {
  char symbol[32];

  for (int version = newest; version >= oldest; version--) {
    snprintf(symbol, sizeof(symbol), "ncclProfiler_v%d", version);
    profiler->slots = dlsym(library, symbol);
    if (!profiler->slots) continue;
    profiler->version = version;
    return true;
  }
  return false;
}

/* ---- the functions in the slots ---- */
typedef int (*init_v1_fn)(void **context, int *mask);
typedef int (*init_v4_fn)(void **context, int *mask, const char *name, uint64_t hash, int nNodes, int nRanks,
                          int rank, nccl_logger logger);
typedef int (*init_v5_fn)(void **context, uint64_t hash, int *mask, const char *name, int nNodes, int nRanks,
                          int rank, nccl_logger logger);
typedef int (*start_fn)(void *context, void **handle, void *event);
typedef int (*stop_fn)(void *handle);
typedef int (*state_fn)(void *handle, int state, void *arguments);

#define SLOT(profiler, slot, type) (*(type *)(const void *)(&(profiler)->slots[slot]))

const char *nccl_profiled_init(struct nccl_profiled *comm, nccl_logger logger) {
  struct nccl_profiler *profiler = comm->profiler;
  const char *name = profiler->slots[SLOT_NAME];
  int result;

  comm->context = NULL;
  if (!name || !name[0]) return "the table has no name";
  if (profiler->version <= 3) {
    result = SLOT(profiler, SLOT_INIT, init_v1_fn)(&comm->context, &profiler->mask);
  } else if (profiler->version == 4) {
    result = SLOT(profiler, SLOT_INIT, init_v4_fn)(&comm->context, &profiler->mask, comm->name, comm->hash,
                                                   comm->nNodes, comm->nRanks, comm->rank, logger);
  } else {
    result = SLOT(profiler, SLOT_INIT, init_v5_fn)(&comm->context, comm->hash, &profiler->mask, comm->name,
                                                   comm->nNodes, comm->nRanks, comm->rank, logger);
  }
  return result == 0 ? NULL : "init failed";
}

const char *nccl_profiled_finalize(struct nccl_profiled *comm) {
  int result = 0;

  /* 2.23 and 2.24 do not ask. */
  if (comm->context || comm->profiler->version <= 2)
    result = SLOT(comm->profiler, SLOT_FINALIZE, stop_fn)(comm->context);
  comm->context = NULL;
  return result == 0 ? NULL : "finalize failed";
}

long ncclEventsStarted[EVENT_TYPES];

/* One group on its way. */
struct flow {
  struct nccl_profiled *comm;
  int version, mask;
  const char *error;
  void *foreign;
};

/* event: of memory as large as the largest event, so that what is read behind a smaller one shows no sign of
 * it; an exact copy would. */
static void *flow_start(struct flow *flow, int type, void *event, void *context) {
  const uint64_t wide = (uint64_t)type;
  void *handle = flow; /* what NCCL leaves there must not matter */

  __atomic_fetch_add(&ncclEventsStarted[__builtin_ctz((unsigned)type)], 1, __ATOMIC_RELAXED);
  memcpy(event, &wide, flow->version >= 5 ? 8 : 1);
  if (SLOT(flow->comm->profiler, SLOT_START, start_fn)(context, &handle, event) != 0)
    flow->error = "startEvent failed";
  if (handle == flow) flow->error = "startEvent left the handle as it was";
  return handle;
}

static void *flow_simple(struct flow *flow, int type, void *parent) {
  unsigned char event[EVENT_BYTES] = {0};

  event_set(flow->version, event, "parent", (uint64_t)(uintptr_t)parent);
  event_set(flow->version, event, "rank", (uint64_t)flow->comm->rank);
  return flow_start(flow, type, event, flow->comm->context);
}

static void flow_stop(struct flow *flow, void *handle) {
  if (handle && SLOT(flow->comm->profiler, SLOT_STOP, stop_fn)(handle) != 0) flow->error = "stopEvent failed";
}

static void flow_state(struct flow *flow, void *handle, int state, bool hasArguments) {
  unsigned char arguments[16] = {5};

  if (handle &&
      SLOT(flow->comm->profiler, SLOT_STATE, state_fn)(handle, state, hasArguments ? arguments : NULL) != 0) {
    flow->error = "recordEventState failed";
  }
}

/* Proxies: an operation with a step in it, and what the net plugin says of that. */
static void flow_proxy(struct flow *flow, void *task, int pid, void *context) {
  unsigned char event[EVENT_BYTES] = {0};
  void *op = NULL, *step = NULL, *net = NULL;

  event_set(flow->version, event, "parent", (uint64_t)(uintptr_t)task);
  event_set(flow->version, event, "rank", (uint64_t)flow->comm->rank);
  event_set(flow->version, event, "op.pid", (uint64_t)pid);
  event_set(flow->version, event, "op.steps", 3);
  event_set(flow->version, event, "op.isSend", 1);
  if (flow->mask & (EVENT_PROXY_OP | EVENT_PROXY_STEP | EVENT_NET_PLUGIN))
    op = flow_start(flow, EVENT_PROXY_OP, event, context);
  flow_state(flow, op, flow->version >= 4 ? STATE_OP_IN_PROGRESS : 0, true);
  memset(event, 0, sizeof(event));
  event_set(flow->version, event, "parent", (uint64_t)(uintptr_t)op);
  event_set(flow->version, event, "rank", (uint64_t)flow->comm->rank);
  event_set(flow->version, event, "step", 1);
  if (flow->mask & (EVENT_PROXY_STEP | EVENT_NET_PLUGIN))
    step = flow_start(flow, EVENT_PROXY_STEP, event, context);
  flow_state(flow, step, STATE_STEP_SEND_WAIT, true);
  memset(event, 0, sizeof(event));
  event_set(flow->version, event, "parent", (uint64_t)(uintptr_t)step);
  event_set(flow->version, event, "net.id", 0x10001);
  if (flow->version >= 3 && flow->mask & EVENT_NET_PLUGIN)
    net = flow_start(flow, EVENT_NET_PLUGIN, event, context);
  if (flow->version >= 4) flow_state(flow, net, STATE_NET_UPDATE, true);
  flow_stop(flow, net);
  flow_stop(flow, step);
  flow_stop(flow, op);
}

/* A kernel's phases, in 2.31 and later. */
static void flow_phases(struct flow *flow, void *kernel) {
  static const char *const names[] = {"initial_sync", "compute", "final_sync"};

  if (flow->version < 7 || !kernel || !(flow->mask & EVENT_KERNEL_PHASE)) return;
  for (unsigned phase = 0; phase < 3; phase++) {
    unsigned char event[EVENT_BYTES] = {0};
    void *handle;

    event_set(flow->version, event, "parent", (uint64_t)(uintptr_t)kernel);
    event_set(flow->version, event, "phase.number", phase);
    event_set(flow->version, event, "phase.name", (uint64_t)(uintptr_t)names[phase]);
    handle = flow_start(flow, EVENT_KERNEL_PHASE, event, flow->comm->context);
    flow_state(flow, handle, STATE_PHASE_STOP, true);
    flow_stop(flow, handle);
  }
}

static void flow_kernel(struct flow *flow, void *task) {
  unsigned char event[EVENT_BYTES] = {0};
  void *handle;

  if (flow->version < 3 || !(flow->mask & EVENT_KERNEL_CHANNEL)) return;
  event_set(flow->version, event, "parent", (uint64_t)(uintptr_t)task);
  event_set(flow->version, event, "kernel.channel", 7);
  event_set(flow->version, event, "kernel.time", 1234567);
  handle = flow_start(flow, EVENT_KERNEL_CHANNEL, event, flow->comm->context);
  flow_phases(flow, handle);
  if (flow->version >= 4) flow_state(flow, handle, STATE_KERNEL_STOP, true);
  flow_stop(flow, handle);
}

static void *flow_task(struct flow *flow, const struct nccl_operation *operation, void *group, void *api) {
  const bool isColl = operation->kind == OPERATION_COLL;
  const char *const name = functionNames[operation->kind];
  const int v = flow->version, type = operation->type >= 0 && operation->type < TYPES ? operation->type : 1;
  unsigned char event[EVENT_BYTES] = {0};

  event_set(v, event, "parent", (uint64_t)(uintptr_t)(v >= 5 ? api : group));
  event_set(v, event, "rank", (uint64_t)flow->comm->rank);
  event_set(v, event, isColl ? "coll.hash" : "p2p.hash", flow->comm->hash);
  event_set_text(v, event, isColl ? "coll.function" : "p2p.function", name, functionCodes[operation->kind]);
  event_set_text(v, event, isColl ? "coll.type" : "p2p.type", typeNames[type], type);
  event_set(v, event, isColl ? "coll.count" : "p2p.count", operation->count);
  event_set(v, event, isColl ? "coll.root" : "p2p.peer", (uint64_t)(uint32_t)operation->peer);
  event_set(v, event, isColl ? "coll.group" : "p2p.group", (uint64_t)(uintptr_t)group);
  event_set(v, event, isColl ? "coll.tag" : "p2p.tag", 1234);
  if (isColl) {
    event_set(v, event, "coll.sequence", 42);
    event_set(v, event, "coll.warps", 16);
    event_set_text(v, event, "coll.protocol", "SIMPLE", 2);
  } else {
    event_set(v, event, "p2p.buffer", (uint64_t)(uintptr_t)operation->buffer);
  }
  return flow_start(flow, isColl ? EVENT_COLL : EVENT_P2P, event, flow->comm->context);
}

/* Whether the release has an event for the operation at all. */
static bool flow_has_task(const struct flow *flow, int kind, const void *group) {
  const int below = EVENT_PROXY_OP | EVENT_PROXY_STEP | EVENT_KERNEL_CHANNEL | EVENT_NET_PLUGIN;

  if (flow->version <= 4 && !group) return false;
  if (flow->version <= 2) return flow->mask & (EVENT_PROXY_OP | EVENT_PROXY_STEP | EVENT_COLL);
  return flow->mask & ((kind == OPERATION_COLL ? EVENT_COLL : EVENT_P2P) | below);
}

/* Copy engines' collectives, in 2.29 and later. */
static void flow_copy_engine(struct flow *flow, void *api) {
  unsigned char event[EVENT_BYTES] = {0};

  if (flow->version < 6 || !(flow->mask & EVENT_CE_COLL)) return;
  event_set(flow->version, event, "parent", (uint64_t)(uintptr_t)api);
  event_set(flow->version, event, "ce.stream", 77);
  flow_stop(flow, flow_start(flow, EVENT_CE_COLL, event, flow->comm->context));
}

static void *flow_api_start(struct flow *flow, const struct nccl_operation *operations, int nOperations,
                            void **apis) {
  const int all = nccl_profiler_types(NCCL_NEWEST_PROFILER) & ~EVENT_PROXY_CONTROL;
  void *group = NULL;

  if (flow->version < 5) return NULL;
  if (flow->mask & all) group = flow_simple(flow, EVENT_GROUP_API, NULL);
  flow_state(flow, group, STATE_GROUP_STARTED, false);
  for (int i = 0; i < nOperations; i++) {
    const bool isColl = operations[i].kind == OPERATION_COLL;

    apis[i] = flow_simple(flow, isColl ? EVENT_COLL_API : EVENT_P2P_API, group);
    flow_stop(flow, apis[i]);
  }
  flow_state(flow, group, STATE_GROUP_ENDS, false);
  return group;
}

const char *nccl_profiled_group(struct nccl_profiled *comm, const struct nccl_operation *operations,
                                int nOperations, bool hasProxies, void *foreign) {
  struct flow flow = {.comm = comm,
                      .version = comm->profiler->version,
                      .mask = __atomic_load_n(&comm->profiler->mask, __ATOMIC_RELAXED),
                      .foreign = foreign};
  void *apis[64] = {NULL}, *tasks[64] = {NULL}, *group = NULL, *apiGroup, *launch = NULL, *control = NULL;

  if (nOperations > 64) return "too many operations for this test";
  if (!flow.mask) return NULL;
  apiGroup = flow_api_start(&flow, operations, nOperations, apis);
  if (flow.version >= 5 && flow.mask & EVENT_KERNEL_LAUNCH)
    launch = flow_simple(&flow, EVENT_KERNEL_LAUNCH, apiGroup);
  flow_stop(&flow, launch);
  flow_copy_engine(&flow, apis[0]);
  if (flow.mask & ~EVENT_PROXY_CONTROL) group = flow_simple(&flow, EVENT_GROUP, NULL);
  for (int i = 0; i < nOperations; i++) {
    if (flow_has_task(&flow, operations[i].kind, group))
      tasks[i] = flow_task(&flow, &operations[i], group, apis[i]);
  }
  for (int i = 0; i < nOperations && hasProxies; i++) {
    flow_kernel(&flow, tasks[i]);
    flow_proxy(&flow, tasks[i], (int)getpid(), comm->context);
  }
  if (foreign) flow_proxy(&flow, foreign, (int)getpid() + 1, foreign);
  if (hasProxies && flow.mask & EVENT_PROXY_CONTROL) control = flow_simple(&flow, EVENT_PROXY_CONTROL, NULL);
  flow_state(&flow, control, STATE_CONTROL_IDLE, true);
  flow_stop(&flow, control);
  for (int i = 0; i < nOperations; i++) flow_stop(&flow, tasks[i]);
  flow_stop(&flow, group);
  flow_stop(&flow, apiGroup);
  return flow.error;
}
