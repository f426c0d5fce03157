/* Another library that takes ncclSend: it stands before NCCL in a client's list of libraries. */
#include "fake_nccl.h"

__attribute__((visibility("default"))) long tracerSends;
__attribute__((visibility("default"))) __typeof__(ncclSend) ncclSend;
extern __typeof__(ncclSend) pncclSend;

int ncclSend(const void *buffer, size_t count, int type, int peer, void *comm, void *stream) {
  tracerSends++;
  return pncclSend(buffer, count, type, peer, comm, stream);
}
