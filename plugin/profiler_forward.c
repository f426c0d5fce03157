#include "profiler_forward.h"

#include "settings.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

static struct {
  void *library;
  int version; /* of the table; 0: none */
  union {
    const void *found;
    const nccl_abi_profiler_v1_t *v1; /* to v3 */
    const nccl_abi_profiler_v4_t *v4;
    const nccl_abi_profiler_v5_t *v5; /* to v7; all but init is the same in all */
  } table;
  int mask; /* the other library's: it may write at any time */
  atomic_bool saidFailed;
} forwardTo;

static pthread_once_t forwardOnce = PTHREAD_ONCE_INIT;
static int forwardNewest; /* NCCL's table, for forward_open */

/* ---- loading ---- */
/* By NCCL's rules for NCCL_PROFILER_PLUGIN. */
static void *forward_library_open(const char *value) {
  char name[SETTINGS_PATH_BYTES + 32];
  void *library = dlopen(value, RTLD_NOW | RTLD_LOCAL);

  if (library || strchr(value, '/')) return library;
  snprintf(name, sizeof(name), "libnccl-profiler-%s.so", value);
  return dlopen(name, RTLD_NOW | RTLD_LOCAL);
}

static bool forward_is_ours(const void *table) {
  return table == &ncclProfiler_v1 || table == &ncclProfiler_v2 || table == &ncclProfiler_v3 ||
         table == &ncclProfiler_v4 || table == &ncclProfiler_v5 || table == &ncclProfiler_v6 ||
         table == &ncclProfiler_v7;
}

static void forward_table_find(const char *value) {
  char symbol[32];

  for (int version = forwardNewest; version >= 1 && forwardTo.version == 0; version--) {
    snprintf(symbol, sizeof(symbol), "ncclProfiler_v%d", version);
    forwardTo.table.found = dlsym(forwardTo.library, symbol);
    if (forwardTo.table.found) forwardTo.version = version;
  }
  if (forwardTo.version == 0) {
    settings_warn("ULTRAEP_PROFILER_FORWARD: %s has no table ncclProfiler_v%d or older; no events go there",
                  value, forwardNewest);
  } else if (forward_is_ours(forwardTo.table.found)) {
    settings_warn("ULTRAEP_PROFILER_FORWARD: %s is this library itself; no events go there", value);
    forwardTo.version = 0;
  }
}

static void forward_open(void) {
  char value[SETTINGS_PATH_BYTES];

  settings_path_expand(settings_get()->profilerForward, value, sizeof(value));
  if (!value[0]) return;
  forwardTo.library = forward_library_open(value);
  if (!forwardTo.library) {
    const char *error = dlerror();

    settings_warn("ULTRAEP_PROFILER_FORWARD: %s cannot be loaded (%s); no events go there", value,
                  error ? error : "no reason given");
    return;
  }
  forward_table_find(value);
}

__attribute__((destructor)) static void forward_close(void) {
  if (forwardTo.library) dlclose(forwardTo.library);
  forwardTo.library = NULL;
  forwardTo.version = 0;
}

/* ---- communicators ---- */
static ultraepResult_t forward_init(profiler_forward_t *forward, const profiler_init_t *init) {
  if (forwardTo.version <= 3) return forwardTo.table.v1->init(&forward->context, &forwardTo.mask);
  if (forwardTo.version == 4)
    return forwardTo.table.v4->init(&forward->context, &forwardTo.mask, init->commName, init->commHash,
                                    init->nNodes, init->nRanks, init->rank, init->logger);
  return forwardTo.table.v5->init(&forward->context, init->commHash, &forwardTo.mask, init->commName,
                                  init->nNodes, init->nRanks, init->rank, init->logger);
}

void profiler_forward_init(profiler_forward_t *forward, const profiler_init_t *init) {
  static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

  *forward = (profiler_forward_t){.commName = init->commName, .commHash = init->commHash};
  pthread_mutex_lock(&lock);
  if (forwardNewest == 0) forwardNewest = init->version;
  pthread_mutex_unlock(&lock);
  pthread_once(&forwardOnce, forward_open);
  if (forwardTo.version == 0 || forwardTo.version > init->version) return;
  forward->isOpen = forward_init(forward, init) == ultraepSuccess;
  if (!forward->isOpen && !atomic_exchange(&forwardTo.saidFailed, true))
    settings_warn("ULTRAEP_PROFILER_FORWARD: the library's init failed; where it does, no events go there");
}

void profiler_forward_finalize(profiler_forward_t *forward) {
  /* NCCL does not finalize a null context either. */
  if (forward->isOpen && forward->context) (void)forwardTo.table.v5->finalize(forward->context);
  *forward = (profiler_forward_t){0};
}

/* Phases come with their kernel's channel alone, which NCCL adds to a mask that it finds after init. */
int profiler_forward_mask(void) {
  const int mask = __atomic_load_n(&forwardTo.mask, __ATOMIC_RELAXED);

  return mask & NCCL_ABI_EVENT_KERNEL_PHASE ? mask | NCCL_ABI_EVENT_KERNEL_CHANNEL : mask;
}

/* ---- events ---- */
/* Steps of proxies belong to a handle, not to a context. */
static bool forward_takes(const profiler_forward_t *forward, const profiler_facts_t *facts) {
  if (!profiler_event_is_wanted(facts->type, profiler_forward_mask())) return false;
  if (forward) return forward->isOpen;
  return facts->type == NCCL_ABI_EVENT_PROXY_OP ||
         (facts->parent &&
          (facts->type == NCCL_ABI_EVENT_PROXY_STEP || facts->type == NCCL_ABI_EVENT_NET_PLUGIN));
}

void profiler_forward_start(const profiler_forward_t *forward, int version, const profiler_facts_t *facts,
                            void *event, void **handle) {
  profiler_event_t converted;

  if (forwardTo.version == 0 || forwardTo.version > version || !forward_takes(forward, facts)) return;
  if (forwardTo.version < version) {
    if (!profiler_event_convert(version, forwardTo.version, event, forward ? forward->commName : NULL,
                                forward ? forward->commHash : 0, &converted))
      return;
    event = &converted;
  }
  if (forwardTo.table.v5->startEvent(forward ? forward->context : NULL, handle, event) != ultraepSuccess)
    *handle = NULL;
}

void profiler_forward_stop(void *handle) {
  if (forwardTo.version > 0) (void)forwardTo.table.v5->stopEvent(handle);
}

void profiler_forward_state(int version, void *handle, int state, void *arguments) {
  profiler_state_t memory;

  if (forwardTo.version == 0 || forwardTo.version > version) return;
  if (profiler_state_convert(version, forwardTo.version, state, arguments, &memory, &arguments))
    (void)forwardTo.table.v5->recordEventState(handle, state, arguments);
}
