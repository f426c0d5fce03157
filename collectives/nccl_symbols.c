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
  } wanted[] = {
      {"ncclGetVersion", (void **)&ncclSymbols.GetVersion},
      {"ncclGetErrorString", (void **)&ncclSymbols.GetErrorString},
      {"ncclCommCount", (void **)&ncclSymbols.CommCount},
      {"ncclCommUserRank", (void **)&ncclSymbols.CommUserRank},
      {"ncclCommCuDevice", (void **)&ncclSymbols.CommCuDevice},
      {"ncclMemAlloc", (void **)&ncclSymbols.MemAlloc},
      {"ncclMemFree", (void **)&ncclSymbols.MemFree},
      {"ncclCommWindowRegister", (void **)&ncclSymbols.CommWindowRegister},
      {"ncclCommWindowDeregister", (void **)&ncclSymbols.CommWindowDeregister},
      {"ncclGetPeerDevicePointer", (void **)&ncclSymbols.GetPeerDevicePointer},
      {"ncclCommGetAsyncError", (void **)&ncclSymbols.CommGetAsyncError},
      {"ncclAllGather", (void **)&ncclSymbols.AllGather},
  };
  void *library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_NOLOAD);
  for (size_t i = 0; i < sizeof(wanted) / sizeof(wanted[0]) && !ncclMissing; i++) {
    *wanted[i].slot = symbols_look_up(library, wanted[i].name);
    if (!*wanted[i].slot) ncclMissing = wanted[i].name;
  }
}

ultraepResult_t nccl_symbols_find(const ncclSymbols_t **symbols) {
  pthread_once(&ncclOnce, symbols_load);
  if (!ncclSymbols.GetVersion) return error_set(ultraepInvalidUsage, "NCCL is not loaded in this process");
  if (ncclMissing) {
    int version = 0;
    (void)ncclSymbols.GetVersion(&version);
    return error_set(ultraepInvalidUsage, "NCCL %d has no %s: groups need NCCL 2.29 or later", version,
                     ncclMissing);
  }
  *symbols = &ncclSymbols;
  return ultraepSuccess;
}
