#include "profiler_event.h"

#include "p2p.h"

#include <string.h>

/* ---- what the traffic record wants ---- */
static bool profiler_is(const char *name, const char *wanted) {
  return name && strcmp(name, wanted) == 0;
}

static void profiler_facts_named(profiler_facts_t *facts, const char *function, const char *dataType,
                                 size_t count, int peer) {
  facts->isSend = profiler_is(function, "Send");
  facts->isRecv = profiler_is(function, "Recv");
  facts->peer = peer;
  facts->bytes = (uint64_t)count * p2p_type_bytes_named(dataType);
}

static void profiler_read_v1(const nccl_abi_event_v1_t *event, profiler_facts_t *facts) {
  *facts = (profiler_facts_t){.type = event->type, .parent = event->parent, .rank = event->rank};
  if (event->type != NCCL_ABI_EVENT_P2P) return;
  facts->isSend = event->p2p.function == NCCL_ABI_FUNCTION_SEND;
  facts->isRecv = event->p2p.function == NCCL_ABI_FUNCTION_RECV;
  facts->peer = event->p2p.peer;
  facts->bytes = (uint64_t)event->p2p.count * p2p_type_bytes(event->p2p.dataType);
  facts->commHash = event->p2p.commHash;
}

/* And v3, which has the same up to here. */
static void profiler_read_v2(const nccl_abi_event_v2_t *event, profiler_facts_t *facts) {
  *facts = (profiler_facts_t){.type = event->type, .parent = event->parent, .rank = event->rank};
  if (event->type != NCCL_ABI_EVENT_P2P) return;
  profiler_facts_named(facts, event->p2p.function, event->p2p.dataType, event->p2p.count, event->p2p.peer);
  facts->commHash = event->p2p.commHash;
}

static void profiler_read_v4(const nccl_abi_event_v4_t *event, profiler_facts_t *facts) {
  *facts = (profiler_facts_t){.type = event->type, .parent = event->parent, .rank = event->rank};
  if (event->type == NCCL_ABI_EVENT_P2P)
    profiler_facts_named(facts, event->p2p.function, event->p2p.dataType, event->p2p.count, event->p2p.peer);
}

/* And v6 and v7. */
static void profiler_read_v5(const nccl_abi_event_v5_t *event, profiler_facts_t *facts) {
  *facts = (profiler_facts_t){.type = event->type, .parent = event->parent, .rank = event->rank};
  if (event->type == NCCL_ABI_EVENT_P2P)
    profiler_facts_named(facts, event->facts.p2p.function, event->facts.p2p.dataType, event->facts.p2p.count,
                         event->facts.p2p.peer);
}

static_assert(offsetof(nccl_abi_event_v3_t, p2p.peer) == offsetof(nccl_abi_event_v2_t, p2p.peer) &&
                  offsetof(nccl_abi_event_v3_t, p2p.dataType) == offsetof(nccl_abi_event_v2_t, p2p.dataType),
              "v3 is read as v2");
static_assert(offsetof(nccl_abi_event_v6_t, facts) == offsetof(nccl_abi_event_v5_t, facts),
              "v6 is read as v5");
static_assert(offsetof(nccl_abi_event_v7_t, facts) == offsetof(nccl_abi_event_v5_t, facts) &&
                  offsetof(nccl_abi_event_v7_t, p2p.peer) == offsetof(nccl_abi_event_v5_t, facts.p2p.peer) &&
                  offsetof(nccl_abi_event_v7_t, p2p.dataType) ==
                      offsetof(nccl_abi_event_v5_t, facts.p2p.dataType),
              "v7 is read as v5");

void profiler_event_read(int version, const void *event, profiler_facts_t *facts) {
  switch (version) {
  case 1:
    profiler_read_v1(event, facts);
    break;
  case 2:
  case 3:
    profiler_read_v2(event, facts);
    break;
  case 4:
    profiler_read_v4(event, facts);
    break;
  default:
    profiler_read_v5(event, facts);
  }
}

/* ---- from one version to the one before; false: it has no such event ---- */
/* What is new in v7 lies behind each of v6's members. */
static_assert(offsetof(nccl_abi_event_v7_t, coll.parentGroup) ==
                      offsetof(nccl_abi_event_v6_t, facts.coll.parentGroup) &&
                  offsetof(nccl_abi_event_v7_t, p2p.parentGroup) ==
                      offsetof(nccl_abi_event_v6_t, facts.p2p.parentGroup) &&
                  offsetof(nccl_abi_event_v7_t, collApi.isCaptured) ==
                      offsetof(nccl_abi_event_v6_t, facts.collApi.isCaptured) &&
                  offsetof(nccl_abi_event_v7_t, p2pApi.isCaptured) ==
                      offsetof(nccl_abi_event_v6_t, facts.p2pApi.isCaptured) &&
                  offsetof(nccl_abi_event_v7_t, ceColl.stream) ==
                      offsetof(nccl_abi_event_v6_t, ceColl.stream),
              "v7 begins as v6");

static bool profiler_event_to_v6(const nccl_abi_event_v7_t *from, nccl_abi_event_v6_t *to) {
  memcpy(to, from, sizeof(*to));
  return from->type < NCCL_ABI_EVENT_KERNEL_PHASE;
}

static bool profiler_event_to_v5(const nccl_abi_event_v6_t *from, nccl_abi_event_v5_t *to) {
  *to = (nccl_abi_event_v5_t){
      .type = from->type, .parent = from->parent, .rank = from->rank, .facts = from->facts};
  return from->type < NCCL_ABI_EVENT_CE_COLL;
}

static bool profiler_event_to_v4(const nccl_abi_event_v5_t *from, nccl_abi_event_v4_t *to) {
  const nccl_abi_event_facts_v5_t *facts = &from->facts;

  *to = (nccl_abi_event_v4_t){.type = (uint8_t)from->type, .parent = from->parent, .rank = from->rank};
  switch (from->type) {
  case NCCL_ABI_EVENT_GROUP:
  case NCCL_ABI_EVENT_PROXY_CONTROL:
    break;
  case NCCL_ABI_EVENT_COLL:
    to->parent = facts->coll.parentGroup;
    to->coll.sequence = facts->coll.sequence;
    to->coll.function = facts->coll.function;
    to->coll.send = facts->coll.send;
    to->coll.recv = facts->coll.recv;
    to->coll.count = facts->coll.count;
    to->coll.root = facts->coll.root;
    to->coll.dataType = facts->coll.dataType;
    to->coll.nChannels = facts->coll.nChannels;
    to->coll.nWarps = facts->coll.nWarps;
    to->coll.algorithm = facts->coll.algorithm;
    to->coll.protocol = facts->coll.protocol;
    break;
  case NCCL_ABI_EVENT_P2P:
    to->parent = facts->p2p.parentGroup;
    to->p2p.function = facts->p2p.function;
    to->p2p.buffer = facts->p2p.buffer;
    to->p2p.dataType = facts->p2p.dataType;
    to->p2p.count = facts->p2p.count;
    to->p2p.peer = facts->p2p.peer;
    to->p2p.nChannels = facts->p2p.nChannels;
    break;
  case NCCL_ABI_EVENT_PROXY_OP:
    to->proxyOp = facts->proxyOp;
    break;
  case NCCL_ABI_EVENT_PROXY_STEP:
    to->step = facts->step;
    break;
  case NCCL_ABI_EVENT_KERNEL_CHANNEL:
    to->kernel = facts->kernel;
    break;
  case NCCL_ABI_EVENT_NET_PLUGIN:
    to->net = facts->net;
    break;
  default:
    return false;
  }
  return true;
}

static bool profiler_event_to_v3(const nccl_abi_event_v4_t *from, const char *commName, uint64_t commHash,
                                 nccl_abi_event_v3_t *to) {
  *to = (nccl_abi_event_v3_t){.type = from->type, .parent = from->parent, .rank = from->rank};
  switch (from->type) {
  case NCCL_ABI_EVENT_COLL:
    to->coll.name = commName;
    to->coll.commHash = commHash;
    to->coll.sequence = from->coll.sequence;
    to->coll.function = from->coll.function;
    to->coll.send = from->coll.send;
    to->coll.recv = from->coll.recv;
    to->coll.count = from->coll.count;
    to->coll.root = from->coll.root;
    to->coll.dataType = from->coll.dataType;
    to->coll.nChannels = from->coll.nChannels;
    to->coll.nWarps = from->coll.nWarps;
    to->coll.algorithm = from->coll.algorithm;
    to->coll.protocol = from->coll.protocol;
    break;
  case NCCL_ABI_EVENT_P2P:
    to->p2p.name = commName;
    to->p2p.commHash = commHash;
    to->p2p.function = from->p2p.function;
    to->p2p.buffer = from->p2p.buffer;
    to->p2p.dataType = from->p2p.dataType;
    to->p2p.count = from->p2p.count;
    to->p2p.peer = from->p2p.peer;
    break;
  case NCCL_ABI_EVENT_PROXY_OP:
    to->proxyOp = from->proxyOp;
    break;
  case NCCL_ABI_EVENT_PROXY_STEP:
    to->step = from->step;
    break;
  case NCCL_ABI_EVENT_KERNEL_CHANNEL:
    to->kernelChannel = from->kernel.channel;
    break;
  case NCCL_ABI_EVENT_NET_PLUGIN:
    to->net = from->net;
    break;
  default:
    break;
  }
  return true;
}

static bool profiler_event_to_v2(const nccl_abi_event_v3_t *from, nccl_abi_event_v2_t *to) {
  *to = (nccl_abi_event_v2_t){.type = from->type, .parent = from->parent, .rank = from->rank};
  switch (from->type) {
  case NCCL_ABI_EVENT_GROUP:
  case NCCL_ABI_EVENT_PROXY_CONTROL:
    return true;
  case NCCL_ABI_EVENT_COLL:
    to->coll.name = from->coll.name;
    to->coll.commHash = from->coll.commHash;
    to->coll.sequence = from->coll.sequence;
    to->coll.function = from->coll.function;
    to->coll.send = from->coll.send;
    to->coll.recv = from->coll.recv;
    to->coll.count = from->coll.count;
    to->coll.root = from->coll.root;
    to->coll.dataType = from->coll.dataType;
    to->coll.nChannels = from->coll.nChannels;
    to->coll.nWarps = from->coll.nWarps;
    to->coll.algorithm = from->coll.algorithm;
    to->coll.protocol = from->coll.protocol;
    return true;
  case NCCL_ABI_EVENT_P2P:
    memcpy(&to->p2p, &from->p2p, sizeof(to->p2p));
    return true;
  case NCCL_ABI_EVENT_PROXY_OP:
    to->proxyOp = from->proxyOp;
    return true;
  case NCCL_ABI_EVENT_PROXY_STEP:
    to->step = from->step;
    return true;
  default:
    return false;
  }
}

/* The code of a name by its place in the list; the last one's where it is not there. */
static uint8_t profiler_code(const char *const *names, int nNames, const char *name) {
  for (int code = 0; code < nNames; code++) {
    if (profiler_is(name, names[code])) return (uint8_t)code;
  }
  return (uint8_t)(nNames - 1);
}

#define PROFILER_CODE(names, name) profiler_code(names, (int)(sizeof(names) / sizeof((names)[0])), name)

static const char *const profilerFunctions[] = {"Broadcast", "Reduce",   "AllGather", "ReduceScatter",
                                                "AllReduce", "SendRecv", "Send",      "Recv"};
static const char *const profilerAlgorithms[] = {
    "TREE", "RING", "COLLNET_DIRECT", "COLLNET_CHAIN", "NVLS", "NVLS_TREE", "PAT"};
static const char *const profilerProtocols[] = {"LL", "LL128", "SIMPLE"};

/* NCCL has no name for uint8, so that is what a type without one is. */
static uint8_t profiler_type_code(const char *name) {
  static const char *const names[] = {"ncclInt8",    "ncclUint8",    "ncclInt32",      "ncclUint32",
                                      "ncclInt64",   "ncclUint64",   "ncclFloat16",    "ncclFloat32",
                                      "ncclFloat64", "ncclBfloat16", "ncclFloat8e4m3", "ncclFloat8e5m2",
                                      "ncclUint8"};
  const uint8_t code = PROFILER_CODE(names, name);

  return code == sizeof(names) / sizeof(names[0]) - 1 ? 1 : code;
}

static bool profiler_event_to_v1(const nccl_abi_event_v2_t *from, nccl_abi_event_v1_t *to) {
  *to = (nccl_abi_event_v1_t){.type = from->type, .parent = from->parent, .rank = from->rank};
  switch (from->type) {
  case NCCL_ABI_EVENT_COLL:
    to->coll.name = from->coll.name;
    to->coll.commHash = from->coll.commHash;
    to->coll.sequence = from->coll.sequence;
    to->coll.function = PROFILER_CODE(profilerFunctions, from->coll.function);
    to->coll.send = from->coll.send;
    to->coll.recv = from->coll.recv;
    to->coll.count = from->coll.count;
    to->coll.root = from->coll.root;
    to->coll.dataType = profiler_type_code(from->coll.dataType);
    to->coll.trafficBytes = from->coll.trafficBytes;
    to->coll.nChannels = from->coll.nChannels;
    to->coll.nWarps = from->coll.nWarps;
    to->coll.algorithm = PROFILER_CODE(profilerAlgorithms, from->coll.algorithm);
    to->coll.protocol = PROFILER_CODE(profilerProtocols, from->coll.protocol);
    break;
  case NCCL_ABI_EVENT_P2P:
    to->p2p.name = from->p2p.name;
    to->p2p.commHash = from->p2p.commHash;
    to->p2p.function = PROFILER_CODE(profilerFunctions, from->p2p.function);
    to->p2p.buffer = from->p2p.buffer;
    to->p2p.dataType = profiler_type_code(from->p2p.dataType);
    to->p2p.count = from->p2p.count;
    to->p2p.peer = from->p2p.peer;
    break;
  case NCCL_ABI_EVENT_PROXY_OP:
    to->proxyOp = from->proxyOp;
    break;
  case NCCL_ABI_EVENT_PROXY_STEP:
    to->step = from->step;
    break;
  default:
    break;
  }
  return true;
}

/* ---- any number of steps ---- */
static bool profiler_event_step(int from, const profiler_event_t *event, const char *commName,
                                uint64_t commHash, profiler_event_t *older) {
  switch (from) {
  case 7:
    return profiler_event_to_v6(&event->v7, &older->v6);
  case 6:
    return profiler_event_to_v5(&event->v6, &older->v5);
  case 5:
    return profiler_event_to_v4(&event->v5, &older->v4);
  case 4:
    return profiler_event_to_v3(&event->v4, commName, commHash, &older->v3);
  case 3:
    return profiler_event_to_v2(&event->v3, &older->v2);
  default:
    return profiler_event_to_v1(&event->v2, &older->v1);
  }
}

static size_t profiler_event_bytes(int version) {
  static const size_t bytes[] = {sizeof(nccl_abi_event_v1_t), sizeof(nccl_abi_event_v2_t),
                                 sizeof(nccl_abi_event_v3_t), sizeof(nccl_abi_event_v4_t),
                                 sizeof(nccl_abi_event_v5_t), sizeof(nccl_abi_event_v6_t),
                                 sizeof(nccl_abi_event_v7_t)};

  return bytes[version - 1];
}

bool profiler_event_convert(int from, int to, const void *event, const char *commName, uint64_t commHash,
                            profiler_event_t *converted) {
  profiler_event_t newer;

  if (from > NCCL_ABI_PROFILER_NEWEST || to < 1 || to > from) return false;
  memcpy(converted, event, profiler_event_bytes(from));
  for (int version = from; version > to; version--) {
    memcpy(&newer, converted, profiler_event_bytes(version));
    if (!profiler_event_step(version, &newer, commName, commHash, converted)) return false;
  }
  return true;
}

/* ---- states ---- */
bool profiler_state_convert(int from, int to, int state, void *arguments, profiler_state_t *memory,
                            void **converted) {
  const nccl_abi_state_v4_t *given = arguments;

  *converted = arguments;
  if (from == to || from < 4) return true;
  if (to >= 6) return state <= NCCL_ABI_STATE_CE_LAST;
  if (to == 5) return state <= NCCL_ABI_STATE_GROUP_END_START;
  if (to == 4) return state <= NCCL_ABI_STATE_KERNEL_STOP;
  if (state < NCCL_ABI_STATE_STEP_FIRST || state > NCCL_ABI_STATE_CONTROL_LAST) return false;
  if (!given) return true;
  memset(memory, 0, sizeof(*memory));
  if (state >= NCCL_ABI_STATE_CONTROL_FIRST) memory->v1.nAppended = given->nAppended;
  *converted = memory;
  return true;
}

/* ---- masks ---- */
bool profiler_event_is_wanted(uint64_t type, int mask) {
  enum {
    STEP = NCCL_ABI_EVENT_PROXY_STEP | NCCL_ABI_EVENT_NET_PLUGIN,
    OP = NCCL_ABI_EVENT_PROXY_OP | STEP,
    KERNEL = NCCL_ABI_EVENT_KERNEL_CHANNEL | NCCL_ABI_EVENT_KERNEL_PHASE,
    TASK = OP | KERNEL,
    CE = NCCL_ABI_EVENT_CE_COLL | NCCL_ABI_EVENT_CE_SYNC | NCCL_ABI_EVENT_CE_BATCH,
    GROUP = NCCL_ABI_EVENT_GROUP | NCCL_ABI_EVENT_COLL | NCCL_ABI_EVENT_P2P | TASK
  };

  switch (type) {
  case NCCL_ABI_EVENT_GROUP:
    return mask & GROUP;
  case NCCL_ABI_EVENT_COLL:
    return mask & (NCCL_ABI_EVENT_COLL | TASK);
  case NCCL_ABI_EVENT_P2P:
    return mask & (NCCL_ABI_EVENT_P2P | TASK);
  case NCCL_ABI_EVENT_PROXY_OP:
    return mask & OP;
  case NCCL_ABI_EVENT_PROXY_STEP:
    return mask & STEP;
  case NCCL_ABI_EVENT_KERNEL_CHANNEL:
    return mask & KERNEL;
  case NCCL_ABI_EVENT_GROUP_API:
    return mask & ~NCCL_ABI_EVENT_PROXY_CONTROL;
  case NCCL_ABI_EVENT_COLL_API:
    return mask & (NCCL_ABI_EVENT_COLL_API | NCCL_ABI_EVENT_COLL | TASK | CE);
  case NCCL_ABI_EVENT_P2P_API:
    return mask & (NCCL_ABI_EVENT_P2P_API | NCCL_ABI_EVENT_P2P | TASK);
  case NCCL_ABI_EVENT_CE_COLL:
    return mask & CE;
  default:
    return ((uint64_t)(unsigned)mask & type) != 0;
  }
}
