#include "moe_energy.h"

#include "symbols.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>

/* NVML by its ABI: 0 is success, a device is a pointer. It stays loaded and initialised. */
static struct {
  int (*Init)(void);
  int (*DeviceGetHandle)(const char *busId, void **device);
  int (*DeviceGetEnergy)(void *device, unsigned long long *millijoules);
  int there;
} energyNvml;

static void energy_open_once(void) {
  const perfSymbol_t wanted[] = {
      {"nvmlInit_v2", (void **)&energyNvml.Init},
      {"nvmlDeviceGetHandleByPciBusId_v2", (void **)&energyNvml.DeviceGetHandle},
      {"nvmlDeviceGetTotalEnergyConsumption", (void **)&energyNvml.DeviceGetEnergy}};
  void *library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == NULL || perfSymbolsFind(library, wanted, sizeof(wanted) / sizeof(wanted[0])) != NULL) return;
  energyNvml.there = energyNvml.Init() == 0;
}

int64_t moeEnergyRead(int device) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  char busId[32] = "";
  void *handle = NULL;
  unsigned long long millijoules = 0;
  pthread_once(&once, energy_open_once);
  if (!energyNvml.there || cudaDeviceGetPCIBusId(busId, sizeof(busId), device) != cudaSuccess) return -1;
  if (energyNvml.DeviceGetHandle(busId, &handle) != 0) return -1;
  return energyNvml.DeviceGetEnergy(handle, &millijoules) == 0 ? (int64_t)millijoules : -1;
}
