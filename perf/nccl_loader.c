#include "nccl_loader.h"

#include "symbols.h"

#include <dlfcn.h>

int ncclLoaderOpen(ncclLoader_t *nccl, perfError_t *error) {
  ncclLoader_t found = {0};
  int (*getVersion)(int *) = NULL;
  const perfSymbol_t wanted[] = {{"ncclGetVersion", (void **)&getVersion},
                                 {"ncclGetUniqueId", (void **)&found.GetUniqueId},
                                 {"ncclCommInitRank", (void **)&found.CommInitRank},
                                 {"ncclCommDestroy", (void **)&found.CommDestroy},
                                 {"ncclCommAbort", (void **)&found.CommAbort},
                                 {"ncclGroupStart", (void **)&found.GroupStart},
                                 {"ncclGroupEnd", (void **)&found.GroupEnd},
                                 {"ncclSend", (void **)&found.Send},
                                 {"ncclRecv", (void **)&found.Recv},
                                 {"ncclGetErrorString", (void **)&found.GetErrorString}};
  /* Global: libultraep looks for NCCL in the program. */
  void *library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_GLOBAL);
  if (library == NULL)
    return perfErrorSet(error, "NCCL cannot be loaded: %.300s (LD_LIBRARY_PATH must name its folder)",
                        dlerror());
  const char *missing = perfSymbolsFind(library, wanted, sizeof(wanted) / sizeof(wanted[0]));
  if (missing != NULL) return perfErrorSet(error, "libnccl.so.2 has no %s", missing);
  if (getVersion(&found.version) != 0 || found.version < NCCL_LOADER_MIN_VERSION)
    return perfErrorSet(error, "NCCL %d.%d.%d is too old: 2.30 or later is needed", found.version / 10000,
                        found.version / 100 % 100, found.version % 100);
  *nccl = found;
  return 0;
}
