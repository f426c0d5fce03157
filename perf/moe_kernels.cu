#include "moe_kernels.h"

#include "moe_values.h"

namespace {

enum { THREADS = 256, PACK = 8 /* elements in 16 bytes */ };

struct alignas(16) Pack {
  uint16_t values[PACK];
};

/* Thread's first element and step of a loop over all of them. */
__device__ int64_t firstItem() {
  return (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
}
__device__ int64_t itemStep() {
  return (int64_t)gridDim.x * blockDim.x;
}

__global__ void fillKernel(uint16_t *to, int64_t count, uint64_t seed, float scale) {
  for (int64_t i = firstItem(); i < count; i += itemStep())
    to[i] = moeBfloat(moeValue(seed, (uint64_t)i) * scale);
}

__global__ void scaleKernel(Pack *rows, const float *weights, int64_t count, int64_t packs) {
  for (int64_t i = firstItem(); i < count * packs; i += itemStep()) {
    Pack pack = rows[i];
    float weight = weights[i / packs];
    for (int j = 0; j < PACK; j++) pack.values[j] = moeBfloat(moeFloat(pack.values[j]) * weight);
    rows[i] = pack;
  }
}

/* packs: of a row of act. */
__global__ void swigluKernel(const Pack *gateUp, Pack *act, int64_t count, int64_t packs) {
  for (int64_t i = firstItem(); i < count * packs; i += itemStep()) {
    int64_t at = i / packs * 2 * packs + i % packs;
    Pack gates = gateUp[at], ups = gateUp[at + packs], result;
    for (int j = 0; j < PACK; j++) {
      float gate = moeFloat(gates.values[j]);
      result.values[j] = moeBfloat(gate / (1.0f + expf(-gate)) * moeFloat(ups.values[j]));
    }
    act[i] = result;
  }
}

__global__ void swigluBackKernel(Pack *gateUp, const Pack *actGrad, int64_t count, int64_t packs) {
  for (int64_t i = firstItem(); i < count * packs; i += itemStep()) {
    int64_t at = i / packs * 2 * packs + i % packs;
    Pack gates = gateUp[at], ups = gateUp[at + packs], grads = actGrad[i];
    for (int j = 0; j < PACK; j++) {
      float gate = moeFloat(gates.values[j]), up = moeFloat(ups.values[j]), grad = moeFloat(grads.values[j]);
      float sigmoid = 1.0f / (1.0f + expf(-gate));
      gates.values[j] = moeBfloat(grad * up * sigmoid * (1.0f + gate * (1.0f - sigmoid)));
      ups.values[j] = moeBfloat(grad * gate * sigmoid);
    }
    gateUp[at] = gates;
    gateUp[at + packs] = ups;
  }
}

__global__ void gatherKernel(moeKernelArrays_t from, uint32_t *to) {
  for (int32_t a = 0; a < from.nArrays; a++) {
    const uint32_t *array = (const uint32_t *)from.arrays[a];
    for (int64_t i = firstItem(); i < from.counts[a]; i += itemStep())
      to[i] = array == nullptr ? 0 : array[i];
    to += from.counts[a];
  }
}

/* Enough blocks for any GPU, or for the items. */
unsigned blocksFor(int64_t items) {
  int64_t blocks = (items + THREADS - 1) / THREADS;
  return (unsigned)(blocks < 2048 ? blocks : 2048);
}

} // namespace

extern "C" cudaError_t moeKernelsLoad(void) {
  const void *kernels[] = {(const void *)fillKernel, (const void *)scaleKernel, (const void *)swigluKernel,
                           (const void *)swigluBackKernel, (const void *)gatherKernel};
  for (const void *kernel : kernels) {
    cudaFuncAttributes attributes;
    cudaError_t loaded = cudaFuncGetAttributes(&attributes, kernel);
    if (loaded != cudaSuccess) return loaded;
  }
  return cudaSuccess;
}

extern "C" cudaError_t moeKernelFill(uint16_t *to, int64_t count, uint64_t seed, float scale,
                                     cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  fillKernel<<<blocksFor(count), THREADS, 0, stream>>>(to, count, seed, scale);
  return cudaGetLastError();
}

extern "C" cudaError_t moeKernelScale(uint16_t *rows, const float *weights, int64_t count, int64_t hidden,
                                      cudaStream_t stream) {
  int64_t packs = hidden / PACK;
  if (count == 0) return cudaSuccess;
  scaleKernel<<<blocksFor(count * packs), THREADS, 0, stream>>>((Pack *)rows, weights, count, packs);
  return cudaGetLastError();
}

extern "C" cudaError_t moeKernelSwiglu(const uint16_t *gateUp, uint16_t *act, int64_t count, int64_t inter,
                                       cudaStream_t stream) {
  int64_t packs = inter / PACK;
  if (count == 0) return cudaSuccess;
  swigluKernel<<<blocksFor(count * packs), THREADS, 0, stream>>>((const Pack *)gateUp, (Pack *)act, count,
                                                                 packs);
  return cudaGetLastError();
}

extern "C" cudaError_t moeKernelSwigluBack(uint16_t *gateUp, const uint16_t *actGrad, int64_t count,
                                           int64_t inter, cudaStream_t stream) {
  int64_t packs = inter / PACK;
  if (count == 0) return cudaSuccess;
  swigluBackKernel<<<blocksFor(count * packs), THREADS, 0, stream>>>((Pack *)gateUp, (const Pack *)actGrad,
                                                                     count, packs);
  return cudaGetLastError();
}

extern "C" cudaError_t moeKernelGather(const moeKernelArrays_t *from, void *to, cudaStream_t stream) {
  gatherKernel<<<1, THREADS, 0, stream>>>(*from, (uint32_t *)to);
  return cudaGetLastError();
}
