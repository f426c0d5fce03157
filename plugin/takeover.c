#include "takeover.h"

#include "elf_slots.h"
#include "p2p.h"
#include "takeover_loader.h"
#include "traffic.h"

#include <dlfcn.h>
#include <errno.h>
#include <linux/membarrier.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* The calls of p2p.h, then the loader's. */
enum { TAKEOVER_DLOPEN = P2P_CALLS, TAKEOVER_DLSYM, TAKEOVER_NAMES };

/* A thread that holds the loader's lock (it runs a constructor) may wait for ours, while we, holding ours,
 * wait for the loader's. Then it goes on after this time, and the look it wanted follows. */
enum { TAKEOVER_PATIENCE_MS = 200 };

struct takeover_target {
  const char *name;
  uintptr_t hook;
  uintptr_t originals[3]; /* what a slot may hold that is to be taken over; 0: none */
  uintptr_t global;       /* what the name means to all objects; 0: nothing, or not the same for all */
};

/* An object with slots that are bound at the first call, whose meaning only its own scope tells. */
struct takeover_scope {
  uintptr_t base;
  char *name;
  unsigned wanted, ours; /* bits by name */
};

static struct {
  pthread_mutex_t lock;
  bool found; /* NCCL, and so `targets` */
  void *nccl; /* handle */
  struct takeover_target targets[TAKEOVER_NAMES];
  nccl_abi_logger_t logger;
  bool saidTaken, saidForeign, saidFailed, saidNone;
} takeover = {.lock = PTHREAD_MUTEX_INITIALIZER};

static atomic_uint takeoverWanted;  /* looks asked for and not begun */
static atomic_bool takeoverPending; /* an object may have come that nobody looked at */
static atomic_size_t takeoverSlots;

/* One look at all objects. */
struct takeover_look {
  bool undo;
  bool again; /* a slot was not bound yet, or is being bound now */
  size_t slots;
  int error; /* of a write */
  const char *errorName;
  uintptr_t foreign; /* what another slot leads to */
  const char *foreignName;
  struct takeover_scope *scopes;
  size_t nScopes;
  struct takeover_scope *scope; /* of the object at hand; null: none yet */
  struct elf_object object;
  const char *objectName;
};

#define TAKEOVER_LOG(...)                                                                                    \
  do {                                                                                                       \
    if (takeover.logger) {                                                                                   \
      takeover.logger(NCCL_ABI_LOG_INFO, NCCL_ABI_SUBSYS_INIT | NCCL_ABI_SUBSYS_TUNING, __func__, __LINE__,  \
                      __VA_ARGS__);                                                                          \
    }                                                                                                        \
  } while (0)

/* ---- finding NCCL ---- */
/* The handle of the object that holds the address, to be closed; null if there is none. name is set to its
 * path, "" for the program. */
static void *takeover_object_open(const void *address, int flags, uintptr_t *start) {
  struct link_map *map = NULL;
  Dl_info info;

  if (!address || !dladdr1(address, &info, (void **)&map, RTLD_DL_LINKMAP) || !map) return NULL;
  if (start) *start = (uintptr_t)info.dli_fbase;
  return dlopen(map->l_name[0] ? map->l_name : NULL, RTLD_LAZY | RTLD_NOLOAD | flags);
}

/* The handle of the NCCL whose function or twin `address` is. A tracer in front of NCCL has no twins. */
static void *takeover_nccl_at(const void *address) {
  uintptr_t start, found;
  void *handle = takeover_object_open(address, 0, &start), *object;
  const void *twin = handle ? dlsym(handle, "pncclGroupStart") : NULL;

  if (!twin) twin = handle ? dlsym(handle, "ncclGroupStart") : NULL;
  object = takeover_object_open(twin, 0, &found);
  if (object) dlclose(object);
  if (object && found == start) return handle;
  if (handle) dlclose(handle);
  return NULL;
}

/* The one that loaded us, in which that address is; else what the program sees; else one under NCCL's name.
 */
static void *takeover_nccl_open(const void *inside) {
  void *nccl = takeover_nccl_at(inside);

  if (!nccl) nccl = takeover_nccl_at(dlsym(RTLD_DEFAULT, "pncclGroupStart"));
  return nccl ? nccl : dlopen("libnccl.so.2", RTLD_LAZY | RTLD_NOLOAD);
}

static void takeover_targets_loader(void) {
  static const char *const names[] = {"dlopen", "dlsym"};
  static const char *const versions[] = {"GLIBC_2.34", "GLIBC_2.2.5", "GLIBC_2.17"};

  for (int i = 0; i < 2; i++) {
    struct takeover_target *target = &takeover.targets[TAKEOVER_DLOPEN + i];
    int count = 1;

    target->name = names[i];
    target->global = (uintptr_t)dlsym(RTLD_DEFAULT, names[i]);
    target->hook = takeover_loader_hook(i, (const void *)target->global);
    target->originals[0] = target->global;
    for (size_t v = 0; v < sizeof(versions) / sizeof(versions[0]) && count < 3; v++) {
      uintptr_t old = (uintptr_t)dlvsym(RTLD_DEFAULT, names[i], versions[v]);

      if (old && old != target->global) target->originals[count++] = old;
    }
  }
}

static bool takeover_targets_find(const void *inside) {
  struct p2p_nccl nccl = {0};
  void *handle = takeover_nccl_open(inside);

  if (!handle) return false;
  for (int call = 0; call < P2P_CALLS; call++) {
    struct takeover_target *target = &takeover.targets[call];
    char twin[32] = "p";
    void *function = dlsym(handle, p2pNames[call]);

    strncat(twin, p2pNames[call], sizeof(twin) - 2);
    nccl.calls[call] = dlsym(handle, twin);
    if (!nccl.calls[call]) nccl.calls[call] = function;
    *target = (struct takeover_target){
        .name = p2pNames[call],
        .hook = (uintptr_t)p2pHooks[call],
        .originals = {(uintptr_t)function, (uintptr_t)nccl.calls[call]},
        .global = (uintptr_t)dlsym(RTLD_DEFAULT, p2pNames[call]),
    };
  }
  nccl.commCount = (p2p_ask_fn)dlsym(handle, "ncclCommCount");
  nccl.commUserRank = (p2p_ask_fn)dlsym(handle, "ncclCommUserRank");
  takeover_targets_loader();
  p2p_nccl_set(&nccl, true);
  takeover.nccl = handle;
  takeover.found = true;
  /* A thread that finds its slot pointed at us must find the originals, too. */
  (void)syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0);
  return true;
}

/* ---- one slot ---- */
static bool takeover_target_original(const struct takeover_target *target, uintptr_t value) {
  for (int i = 0; i < 3; i++) {
    if (target->originals[i] && target->originals[i] == value) return true;
  }
  return false;
}

static void takeover_slot_write(struct takeover_look *look, const struct elf_slot *slot, int name,
                                uintptr_t value) {
  int error = elf_slot_write(slot->address, value);

  if (error) {
    look->error = error;
    look->errorName = slot->name;
    return;
  }
  look->slots += name < P2P_CALLS && !look->undo;
}

/* Notes that the object's own scope must be asked for the name. Where memory is short, a later look will. */
static void takeover_scope_want(struct takeover_look *look, int name) {
  if (!look->scope) {
    struct takeover_scope *scopes = realloc(look->scopes, (look->nScopes + 1) * sizeof(*scopes));
    char *copy = strdup(look->objectName);

    if (scopes) look->scopes = scopes;
    if (!scopes || !copy) {
      free(copy);
      look->again = true;
      return;
    }
    look->scope = &scopes[look->nScopes++];
    *look->scope = (struct takeover_scope){.base = look->object.base, .name = copy};
  }
  look->scope->wanted |= 1u << name;
}

/* A slot that still leads into its own object, to the stub that binds it. */
static bool takeover_slot_lazy(struct takeover_look *look, int name) {
  const struct takeover_target *target = &takeover.targets[name];

  if (target->global) return takeover_target_original(target, target->global);
  if (look->scope && look->scope->wanted & 1u << name) return (look->scope->ours & 1u << name) != 0;
  takeover_scope_want(look, name);
  return false;
}

static int takeover_name(const char *name) {
  if (strncmp(name, "nccl", 4) != 0 && strncmp(name, "dl", 2) != 0) return -1;
  for (int i = 0; i < TAKEOVER_NAMES; i++) {
    if (takeover.targets[i].name && strcmp(name, takeover.targets[i].name) == 0) return i;
  }
  return -1;
}

static void takeover_slot_visit(const struct elf_slot *slot, void *argument) {
  struct takeover_look *look = argument;
  const uintptr_t value = __atomic_load_n(slot->address, __ATOMIC_RELAXED);
  const int name = takeover_name(slot->name);
  const struct takeover_target *target = &takeover.targets[name < 0 ? 0 : name];

  if (name < 0 || !target->hook) return;
  if (value == target->hook) {
    if (look->undo) {
      takeover_slot_write(look, slot, name,
                          name < P2P_CALLS ? (uintptr_t)p2p_original(name) : target->global);
    } else {
      look->slots += name < P2P_CALLS;
    }
  } else if (look->undo) {
    return;
  } else if (takeover_target_original(target, value)) {
    takeover_slot_write(look, slot, name, target->hook);
  } else if (slot->jump && !slot->defined && elf_object_holds(&look->object, (const void *)value)) {
    if (!takeover_slot_lazy(look, name)) return;
    look->again = true; /* its first call may be binding it now, and would undo this */
    takeover_slot_write(look, slot, name, target->hook);
  } else if (value < look->object.high - look->object.low) {
    /* What the file says: the loader is not there yet. A weak reference to nothing stays 0. */
    if (value || !slot->weak) look->again = true;
  } else if (name < P2P_CALLS) {
    look->foreign = value;
    look->foreignName = target->name;
  }
}

/* ---- all objects ---- */
static int takeover_object_visit(struct dl_phdr_info *info, size_t bytes, void *argument) {
  struct takeover_look *look = argument;

  (void)bytes;
  if (!elf_object_read(info, &look->object)) return 0;
  if (elf_object_holds(&look->object, (const void *)takeover_start)) return 0;
  if (elf_object_holds(&look->object, p2p_original(P2P_GROUP_START))) return 0;
  look->objectName = info->dlpi_name;
  look->scope = NULL;
  for (size_t i = 0; i < look->nScopes; i++) {
    if (look->scopes[i].base == look->object.base) look->scope = &look->scopes[i];
  }
  elf_slots_walk(&look->object, takeover_slot_visit, look);
  return 0;
}

/* Outside of dl_iterate_phdr, under whose lock the loader must not be called. */
static void takeover_scope_ask(struct takeover_scope *scope) {
  void *handle = dlopen(scope->name[0] ? scope->name : NULL, RTLD_LAZY | RTLD_NOLOAD);

  if (!handle) return;
  for (int i = 0; i < TAKEOVER_NAMES; i++) {
    if (!(scope->wanted & 1u << i)) continue;
    if (takeover_target_original(&takeover.targets[i], (uintptr_t)dlsym(handle, takeover.targets[i].name)))
      scope->ours |= 1u << i;
  }
  dlclose(handle);
}

static void takeover_look_say(const struct takeover_look *look) {
  Dl_info info;

  if (look->foreign && !takeover.saidForeign) {
    const bool known = dladdr((const void *)look->foreign, &info) != 0 && info.dli_fname;

    takeover.saidForeign = true;
    TAKEOVER_LOG(
        "UltraEP: some calls of %s lead to %s, not to this NCCL: left alone, their traffic is not seen here",
        look->foreignName, known ? info.dli_fname : "an unknown place");
  }
  if (look->error && !takeover.saidFailed) {
    takeover.saidFailed = true;
    TAKEOVER_LOG("UltraEP: calls of %s cannot be taken over (%s): their traffic is not seen", look->errorName,
                 strerrordesc_np(look->error));
  }
  if (look->slots > 0 && !takeover.saidTaken) {
    takeover.saidTaken = true;
    TAKEOVER_LOG("UltraEP: send, receive and group calls taken over in %zu places", look->slots);
  }
  if (look->slots == 0 && !look->foreign && !look->error && !takeover.saidNone) {
    takeover.saidNone = true;
    TAKEOVER_LOG("UltraEP: nothing loaded calls NCCL through the dynamic linker (linked statically, or found "
                 "by dlsym): "
                 "traffic is not seen; libultraep-preload.so may help");
  }
}

/* After a look the scopes are asked that it could not ask, and the next one knows. An object that comes in
 * between needs a third; one that is never answered stays as it is. */
static void takeover_look(bool undo) {
  struct takeover_look look = {.undo = undo};
  size_t asked = 0;

  for (int round = 0; round < 3 && (round == 0 || asked < look.nScopes); round++) {
    for (; asked < look.nScopes; asked++) takeover_scope_ask(&look.scopes[asked]);
    look.slots = 0;
    dl_iterate_phdr(takeover_object_visit, &look);
  }
  for (size_t i = 0; i < look.nScopes; i++) free(look.scopes[i].name);
  free(look.scopes);
  if (look.again) atomic_store(&takeoverPending, true);
  atomic_store(&takeoverSlots, look.slots);
  if (!undo) takeover_look_say(&look);
}

static bool takeover_lock(void) {
  struct timespec until;

  clock_gettime(CLOCK_REALTIME, &until);
  until.tv_nsec += TAKEOVER_PATIENCE_MS * 1000000L;
  until.tv_sec += until.tv_nsec / 1000000000L;
  until.tv_nsec %= 1000000000L;
  return pthread_mutex_timedlock(&takeover.lock, &until) == 0;
}

/* Whoever holds the lock does the looks of those who gave up. The loader's messages and errno stay the
 * caller's. */
static void takeover_look_wanted(void) {
  const int error = errno;

  atomic_fetch_add(&takeoverWanted, 1);
  while (atomic_load(&takeoverWanted) > 0 && takeover_lock()) {
    if (atomic_exchange(&takeoverWanted, 0) > 0 && takeover.found) takeover_look(false);
    pthread_mutex_unlock(&takeover.lock);
  }
  (void)dlerror();
  errno = error;
}

void takeover_look_again(void) {
  takeover_look_wanted();
}

void takeover_look_pending(void) {
  if (!atomic_load_explicit(&takeoverPending, memory_order_relaxed)) return;
  if (atomic_exchange(&takeoverPending, false)) takeover_look_wanted();
}

void takeover_look_later(void) {
  atomic_store(&takeoverPending, true);
}

/* ---- the way in and out ---- */
/* Null in a program that has us linked in: that stays anyway. */
static void takeover_self_pin(void) {
  void *handle = takeover_object_open((const void *)takeover_start, RTLD_NODELETE, NULL);

  if (handle) dlclose(handle);
}

bool takeover_is_preloaded(void) {
  return p2p_wanted() && dlsym(RTLD_DEFAULT, "ultraepPreload") != NULL;
}

void takeover_start_at(const void *inside, nccl_abi_logger_t logger) {
  if (!p2p_wanted() || takeover_is_preloaded() || !takeover_lock()) return;
  if (logger) {
    takeover.logger = logger;
    traffic_logger_set(logger);
  }
  if (!takeover.found && takeover_targets_find(inside)) {
    takeover_self_pin();
    p2p_group_watch(takeover_look_pending);
  } else if (!takeover.found && !takeover.saidNone) {
    takeover.saidNone = true;
    TAKEOVER_LOG(
        "UltraEP: NCCL's functions are not to be found in this process (linked statically?): its traffic is "
        "not seen");
  }
  pthread_mutex_unlock(&takeover.lock);
  takeover_look_wanted();
}

void takeover_start(nccl_abi_logger_t logger) {
  takeover_start_at((const void *)logger, logger);
}

/* The originals stay set: a thread may still be on its way through one of our functions. */
void takeover_undo(void) {
  if (!takeover_lock()) return;
  if (takeover.found) {
    takeover_look(true);
    takeover.found = false;
    dlclose(takeover.nccl);
    takeover.nccl = NULL;
    takeover.saidTaken = false;
  }
  pthread_mutex_unlock(&takeover.lock);
}

__attribute__((destructor)) static void takeover_end(void) {
  takeover_undo();
}

size_t takeover_slots(void) {
  return atomic_load(&takeoverSlots);
}
