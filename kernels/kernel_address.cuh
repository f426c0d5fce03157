// A kernel as CUDA's runtime names it.
#ifndef ULTRAEP_KERNEL_ADDRESS_CUH_
#define ULTRAEP_KERNEL_ADDRESS_CUH_

#include <cuda_runtime.h>

namespace ultraep {

template <typename... Parameters> const void *kernelAddress(void (*kernel)(Parameters...)) {
  return reinterpret_cast<const void *>(kernel);
}

} // namespace ultraep

#endif
