#include "nccl_symbols.h"

#include "error.h"

#include <dlfcn.h>
#include <pthread.h>

static ncclSymbols_t ncclSymbols;
static const char *ncclMissing; /* the first function not found */
static pthread_once_t ncclOnce = PTHREAD_ONCE_INIT;

/* The program's own NCCL first; then one that was loaded out of sight, as frameworks' bundled copies are. */
static void *symbols_look_up(void *library, const char *name) {
  void *symbol = dlsym(RTLD_DEFAULT, name);
  return symbol || !library ? symbol : dlsym(library, name);
}

static void symbols_load(void) {
  const struct {
    const char *name;
    void **slot;
    enum { SYMBOL_NEEDED, SYMBOL_OPTIONAL, SYMBOL_WINDOW } use;
  } wanted[] = {
      {"ncclGetVersion", (void **)&ncclSymbols.GetVersion, SYMBOL_NEEDED},
      {"ncclGetErrorString", (void **)&ncclSymbols.GetErrorString, SYMBOL_NEEDED},
      {"ncclCommCount", (void **)&ncclSymbols.CommCount, SYMBOL_NEEDED},
      {"ncclCommUserRank", (void **)&ncclSymbols.CommUserRank, SYMBOL_NEEDED},
      {"ncclCommCuDevice", (void **)&ncclSymbols.CommCuDevice, SYMBOL_NEEDED},
      {"ncclAllGather", (void **)&ncclSymbols.AllGather, SYMBOL_NEEDED},
      {"ncclCommGetAsyncError", (void **)&ncclSymbols.CommGetAsyncError, SYMBOL_OPTIONAL},
      {"ncclMemAlloc", (void **)&ncclSymbols.MemAlloc, SYMBOL_WINDOW},
      {"ncclMemFree", (void **)&ncclSymbols.MemFree, SYMBOL_WINDOW},
      {"ncclCommWindowRegister", (void **)&ncclSymbols.CommWindowRegister, SYMBOL_WINDOW},
      {"ncclCommWindowDeregister", (void **)&ncclSymbols.CommWindowDeregister, SYMBOL_WINDOW},
      {"ncclGetPeerDevicePointer", (void **)&ncclSymbols.GetPeerDevicePointer, SYMBOL_WINDOW},
  };
  void *library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_NOLOAD);
  int version = 0;
  bool hasWindows = true;
  for (size_t i = 0; i < sizeof(wanted) / sizeof(wanted[0]) && !ncclMissing; i++) {
    *wanted[i].slot = symbols_look_up(library, wanted[i].name);
    if (*wanted[i].slot) continue;
    if (wanted[i].use == SYMBOL_NEEDED) ncclMissing = wanted[i].name;
    if (wanted[i].use == SYMBOL_WINDOW) hasWindows = false;
  }
  if (ncclMissing || ncclSymbols.GetVersion(&version) != 0) return;
  ncclSymbols.hasWindows = hasWindows && version >= NCCL_WINDOW_VERSION;
}

ultraepResult_t nccl_symbols_find(const ncclSymbols_t **symbols) {
  pthread_once(&ncclOnce, symbols_load);
  if (!ncclSymbols.GetVersion) return error_set(ultraepInvalidUsage, "NCCL is not loaded in this process");
  if (ncclMissing) {
    int version = 0;
    (void)ncclSymbols.GetVersion(&version);
    return error_set(ultraepInvalidUsage, "NCCL %d has no %s: groups need NCCL 2.19 or later", version,
                     ncclMissing);
  }
  *symbols = &ncclSymbols;
  return ultraepSuccess;
}
