/* How ranks agree: each tells all others something, by NCCL's AllGather. */
#include "nccl_backend.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

ultraepResult_t nccl_stream_wait(ncclRank_t *self, const char *phase) {
  int64_t deadline = nccl_now_ms() + self->timeoutMs;
  for (;;) {
    cudaError_t error = cudaStreamQuery(self->stream);
    if (error == cudaSuccess) return ultraepSuccess;
    if (error != cudaErrorNotReady) return nccl_cuda_error(error, phase);
    if (self->failure->abort) {
      self->isStuck = true; /* what is in the stream may never end */
      return error_set(ultraepRemoteError, "%s: the group was aborted on this rank", phase);
    }
    if (nccl_now_ms() > deadline) return nccl_give_up(self, phase);
    nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
  }
}

typedef struct {
  const void *send;
  void *recv;
  size_t bytes;
  cudaStream_t stream;
} agreeGather_t;

static int agree_all_gather(const ncclSymbols_t *nccl, ncclComm_t comm, void *argument) {
  const agreeGather_t *gather = argument;
  return nccl->AllGather(gather->send, gather->recv, gather->bytes, NCCL_TYPE_INT8, comm, gather->stream);
}

/* One rank's message on its way. */
typedef struct {
  uint64_t stamp;
  unsigned char body[NCCL_AGREE_BYTES];
} agreeMessage_t;
#define AGREE_HEAD_BYTES offsetof(agreeMessage_t, body)

size_t nccl_agree_buffer_bytes(const ncclRank_t *self) {
  return sizeof(agreeMessage_t) * ((size_t)self->nRanks + 1);
}

/* What a message is known by: agreement, rank and body (FNV-1a over words of 64 bits). */
static uint64_t agree_stamp(const ncclRank_t *self, int rank, const unsigned char *body, size_t bytes) {
  const uint64_t prime = 0x100000001b3u;
  uint64_t hash = (0xcbf29ce484222325u ^ self->nAgreements) * prime;
  hash = (hash ^ (uint64_t)rank) * prime;
  hash = (hash ^ bytes) * prime;
  for (size_t i = 0; i < bytes; i += sizeof(uint64_t)) {
    uint64_t word = 0;
    memcpy(&word, body + i, bytes - i < sizeof(word) ? bytes - i : sizeof(word));
    hash = (hash ^ word) * prime;
  }
  return hash;
}

/* Where a rank aborts the communicator while others wait in NCCL's kernel, that kernel may end there as if
 * all had come, with anything in place of what has not: NCCL's error comes later, if at all. So a message
 * counts only with its stamp. */
static ultraepResult_t agree_read(ncclRank_t *self, const unsigned char *came, void *messages, size_t bytes,
                                  const char *phase) {
  for (int r = 0; r < self->nRanks; r++) {
    const unsigned char *message = came + (size_t)r * (AGREE_HEAD_BYTES + bytes);
    uint64_t stamp;
    memcpy(&stamp, message, sizeof(stamp));
    if (stamp != agree_stamp(self, r, message + AGREE_HEAD_BYTES, bytes)) {
      nccl_fail(self, ultraepRemoteError);
      return error_set(ultraepRemoteError,
                       "%s: the communicator was aborted: what came in place of rank %d's message is not it",
                       phase, r);
    }
    memcpy((unsigned char *)messages + (size_t)r * bytes, message + AGREE_HEAD_BYTES, bytes);
  }
  return ultraepSuccess;
}

/* Gives every rank's `wire` bytes to all. */
static ultraepResult_t agree_gather(ncclRank_t *self, const agreeMessage_t *mine, unsigned char *came,
                                    size_t wire, const char *phase) {
  agreeGather_t gather = {self->agreeBuffer, self->agreeBuffer + sizeof(*mine), wire, self->stream};
  cudaError_t error = cudaMemcpyAsync(self->agreeBuffer, mine, wire, cudaMemcpyHostToDevice, self->stream);
  if (error != cudaSuccess) return nccl_cuda_error(error, phase);
  ultraepResult_t result = nccl_call(self, agree_all_gather, &gather, sizeof(gather), phase);
  if (result == ultraepSuccess) result = nccl_stream_wait(self, phase);
  if (result != ultraepSuccess) return result;
  error =
      cudaMemcpyAsync(came, gather.recv, wire * (size_t)self->nRanks, cudaMemcpyDeviceToHost, self->stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(self->stream);
  return error == cudaSuccess ? ultraepSuccess : nccl_cuda_error(error, phase);
}

ultraepResult_t nccl_agree(ncclRank_t *self, const void *mine, void *messages, size_t bytes,
                           const char *phase) {
  size_t wire = AGREE_HEAD_BYTES + bytes;
  agreeMessage_t message;
  unsigned char *came = malloc(wire * (size_t)self->nRanks);
  if (!came) return error_set(ultraepSystemError, "%s: no memory for the ranks' messages", phase);
  self->nAgreements++;
  memcpy(message.body, mine, bytes);
  message.stamp = agree_stamp(self, self->rank, message.body, bytes);
  ultraepResult_t result = agree_gather(self, &message, came, wire, phase);
  if (result == ultraepSuccess) result = agree_read(self, came, messages, bytes, phase);
  free(came);
  return result;
}
