#include "profiler_recorder.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HANDLES = 4096, CONTEXTS = 64 };

struct handle {
  uint64_t type;
  int isOpen;
};

static struct handle handles[HANDLES];
static int nHandles;
static struct { int isOpen; } contexts[CONTEXTS];

__attribute__((visibility("default"))) struct recorder_log recorderLog = {.version = RECORDER_TABLE};

__attribute__((format(printf, 1, 2))) static void bad(const char *format, ...) {
  va_list arguments;

  if (recorderLog.error[0]) return;
  va_start(arguments, format);
  vsnprintf(recorderLog.error, sizeof(recorderLog.error), format, arguments);
  va_end(arguments);
}

static int handle_number(const void *handle) {
  const size_t offset = (size_t)((const char *)handle - (const char *)handles);

  if (offset >= sizeof(handles) || offset % sizeof(handles[0]) != 0) return -1;
  return (int)(offset / sizeof(handles[0])) < nHandles ? (int)(offset / sizeof(handles[0])) : -1;
}

static int recorder_open(void **context, int *mask, uint64_t hash, int rank) {
  const char *wanted = getenv("RECORDER_MASK"), *fails = getenv("RECORDER_FAIL");

  if (fails && fails[0] == '1') return 3;
  recorderLog.inits++;
  recorderLog.contexts++;
  recorderLog.initHash = hash;
  recorderLog.initRank = rank;
  recorderLog.mask = mask;
  *mask = wanted ? (int)strtol(wanted, NULL, 0) : 0;
  for (int i = 0; i < CONTEXTS; i++) {
    if (contexts[i].isOpen) continue;
    contexts[i].isOpen = 1;
    *context = &contexts[i];
    return 0;
  }
  bad("too many contexts");
  return 3;
}

#if RECORDER_TABLE <= 3
static int recorder_init(void **context, int *mask) {
  return recorder_open(context, mask, 0, -1);
}
#elif RECORDER_TABLE == 4
static int recorder_init(void **context, int *mask, const char *name, uint64_t hash, int nNodes, int nRanks,
                         int rank, nccl_logger logger) {
  (void)name, (void)nNodes, (void)nRanks, (void)logger;
  return recorder_open(context, mask, hash, rank);
}
#else
static int recorder_init(void **context, uint64_t hash, int *mask, const char *name, int nNodes, int nRanks,
                         int rank, nccl_logger logger) {
  (void)name, (void)nNodes, (void)nRanks, (void)logger;
  return recorder_open(context, mask, hash, rank);
}
#endif

static int context_is_ours(const void *context) {
  for (int i = 0; i < CONTEXTS; i++) {
    if (context == &contexts[i]) return contexts[i].isOpen;
  }
  return 0;
}

static void text_copy(char *to, const void *event, const char *field) {
#if RECORDER_TABLE == 1
  snprintf(to, 16, "%d", (int)nccl_event_number(1, event, field));
#else
  snprintf(to, 16, "%s", nccl_event_text(RECORDER_TABLE, event, field));
#endif
}

static void start_p2p(void *context, const void *event) {
  text_copy(recorderLog.function, event, "p2p.function");
  text_copy(recorderLog.type, event, "p2p.type");
  recorderLog.count = nccl_event_number(RECORDER_TABLE, event, "p2p.count");
  recorderLog.hash = nccl_event_number(RECORDER_TABLE, event, "p2p.hash");
  recorderLog.peer = (int)nccl_event_number(RECORDER_TABLE, event, "p2p.peer");
  recorderLog.rank = (int)nccl_event_number(RECORDER_TABLE, event, "rank");
  recorderLog.context = context;
  if (nccl_event_number(RECORDER_TABLE, event, "p2p.tag") != (RECORDER_TABLE >= 7 ? 1234 : 0))
    bad("tag of a send or receive");
  recorderLog.parent = (void *)(uintptr_t)nccl_event_number(RECORDER_TABLE, event, "parent");
}

static void start_coll(const void *event) {
  char protocol[16];

  text_copy(protocol, event, "coll.protocol");
  if (strcmp(protocol, RECORDER_TABLE == 1 ? "2" : "SIMPLE") != 0) bad("protocol %s", protocol);
  if (nccl_event_number(RECORDER_TABLE, event, "coll.sequence") != 42) bad("sequence of a collective");
  if (nccl_event_number(RECORDER_TABLE, event, "coll.warps") != 16) bad("warps of a collective");
  if (nccl_event_number(RECORDER_TABLE, event, "coll.tag") != (RECORDER_TABLE >= 7 ? 1234 : 0))
    bad("tag of a collective");
}

static void start_other(uint64_t type, const void *event) {
  if (type == EVENT_PROXY_OP && nccl_event_number(RECORDER_TABLE, event, "op.steps") != 3) bad("proxy steps");
  if (type == EVENT_PROXY_OP && nccl_event_number(RECORDER_TABLE, event, "op.isSend") != 1) bad("proxy side");
  if (type == EVENT_PROXY_STEP && nccl_event_number(RECORDER_TABLE, event, "step") != 1) bad("proxy step");
  if (type == EVENT_KERNEL_CHANNEL && nccl_event_number(RECORDER_TABLE, event, "kernel.channel") != 7)
    bad("kernel's channel");
  if (type == EVENT_NET_PLUGIN && nccl_event_number(RECORDER_TABLE, event, "net.id") != 0x10001)
    bad("net plugin's id");
  if (type == EVENT_KERNEL_PHASE && (nccl_event_number(RECORDER_TABLE, event, "phase.number") > 2 ||
                                     !nccl_event_text(RECORDER_TABLE, event, "phase.name")))
    bad("kernel's phase");
  if (type == EVENT_CE_COLL && nccl_event_number(RECORDER_TABLE, event, "ce.stream") != 77) bad("CE stream");
}

static int recorder_start(void *context, void **handle, void *event) {
  const uint64_t type = nccl_event_number(RECORDER_TABLE, event, "type");
  void *parent = (void *)(uintptr_t)nccl_event_number(RECORDER_TABLE, event, "parent");
  const int isForeign =
      !context && (type == EVENT_PROXY_OP || type == EVENT_PROXY_STEP || type == EVENT_NET_PLUGIN);

  *handle = NULL;
  if (!isForeign && !context_is_ours(context))
    bad("event %#llx with a strange context", (unsigned long long)type);
  /* What another process's operation belongs to is that process's. */
  if (parent && handle_number(parent) < 0 && !(isForeign && type == EVENT_PROXY_OP))
    bad("event %#llx with a strange parent", (unsigned long long)type);
  if (type == 0 || type & (type - 1) || !(type & (uint64_t)nccl_profiler_types(RECORDER_TABLE))) {
    bad("event %#llx is none of version %d", (unsigned long long)type, RECORDER_TABLE);
    return 0;
  }
  recorderLog.starts[__builtin_ctzll(type)]++;
  if (type == EVENT_P2P) start_p2p(context, event);
  if (type == EVENT_COLL) start_coll(event);
  start_other(type, event);
  if (nHandles == HANDLES) return 0;
  handles[nHandles] = (struct handle){type, 1};
  *handle = &handles[nHandles++];
  recorderLog.open++;
  return 0;
}

static int recorder_stop(void *handle) {
  const int number = handle_number(handle);

  if (number < 0 || !handles[number].isOpen) {
    bad("a handle is stopped that is not open");
    return 0;
  }
  handles[number].isOpen = 0;
  recorderLog.open--;
  recorderLog.stops++;
  return 0;
}

static int recorder_state(void *handle, int state, void *arguments) {
  (void)state, (void)arguments;
  if (handle_number(handle) < 0) bad("a strange handle has state %d", state);
  if (RECORDER_TABLE <= 3 && state > 18) bad("state %d is none of version %d", state, RECORDER_TABLE);
  if (RECORDER_TABLE <= 6 && state > 30) bad("state %d is none of version %d", state, RECORDER_TABLE);
  if (RECORDER_TABLE == 4 && state > 22) bad("state %d is none of version 4", state);
  recorderLog.states++;
  return 0;
}

static int recorder_finalize(void *context) {
  if (!context_is_ours(context)) {
    bad("a strange context is finalized");
    return 0;
  }
  for (int i = 0; i < CONTEXTS; i++) {
    if (context == &contexts[i]) contexts[i].isOpen = 0;
  }
  recorderLog.finalizes++;
  recorderLog.contexts--;
  return 0;
}

struct recorder_table {
  const char *name;
  void *slots[5];
};

#define RECORDER_NAME_(version) ncclProfiler_v##version
#define RECORDER_NAME(version) RECORDER_NAME_(version)
extern const struct recorder_table RECORDER_NAME(RECORDER_TABLE);
__attribute__((visibility("default"))) const struct recorder_table RECORDER_NAME(RECORDER_TABLE) = {
    "recorder",
    {(void *)recorder_init, (void *)recorder_start, (void *)recorder_stop, (void *)recorder_state,
     (void *)recorder_finalize}};
