#include "moe_cublas.h"

#include "symbols.h"

#include <dlfcn.h>
#include <pthread.h>

static moeCublas_t cublasLoaded;
static perfError_t cublasError;
static int cublasStatus;

static void *cublas_library_open(void) {
  /* What is used of it is the same in both. */
  void *library = dlopen("libcublas.so.13", RTLD_NOW | RTLD_LOCAL);
  return library != NULL ? library : dlopen("libcublas.so.12", RTLD_NOW | RTLD_LOCAL);
}

static int cublas_load(moeCublas_t *cublas, perfError_t *error) {
  const perfSymbol_t wanted[] = {{"cublasCreate_v2", (void **)&cublas->Create},
                                 {"cublasDestroy_v2", (void **)&cublas->Destroy},
                                 {"cublasSetStream_v2", (void **)&cublas->SetStream},
                                 {"cublasSetWorkspace_v2", (void **)&cublas->SetWorkspace},
                                 {"cublasSetSmCountTarget", (void **)&cublas->SetSmCountTarget},
                                 {"cublasGemmEx", (void **)&cublas->GemmEx},
                                 {"cublasGemmGroupedBatchedEx", (void **)&cublas->GemmGroupedBatchedEx},
                                 {"cublasGetStatusString", (void **)&cublas->GetStatusString}};
  void *library = cublas_library_open();
  if (library == NULL)
    return perfErrorSet(error, "cuBLAS cannot be loaded: %.300s (LD_LIBRARY_PATH must name its folder)",
                        dlerror());
  const char *missing = perfSymbolsFind(library, wanted, sizeof(wanted) / sizeof(wanted[0]));
  return missing == NULL ? 0 : perfErrorSet(error, "this cuBLAS is too old: it has no %s", missing);
}

static void cublas_load_once(void) {
  cublasStatus = cublas_load(&cublasLoaded, &cublasError);
}

int moeCublasOpen(const moeCublas_t **cublas, perfError_t *error) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, cublas_load_once);
  *error = cublasError;
  *cublas = &cublasLoaded;
  return cublasStatus;
}
