/* A library that calls NCCL, built in several ways (bound at the first call, at once with full RELRO, without
 * PLT). All it does goes through its own slots. */
#ifndef ULTRAEP_TESTS_TAKEOVER_CLIENT_H_
#define ULTRAEP_TESTS_TAKEOVER_CLIENT_H_

#include "fake_nccl.h"

struct client {
  __typeof__(ncclSend) *send;
  __typeof__(ncclRecv) *recv;
  __typeof__(ncclGroupStart) *groupStart;
  __typeof__(ncclGroupEnd) *groupEnd;
  __typeof__(ncclGroupSimulateEnd) *groupSimulateEnd;
  __typeof__(ncclAllReduce) *allReduce;
  __typeof__(ncclAlltoAll) *allToAll;
  __typeof__(ncclGather) *gather;
  __typeof__(ncclScatter) *scatter;
  __typeof__(ncclPutSignal) *putSignal;
  __typeof__(ncclCommInitRank) *init;
  __typeof__(ncclCommInitRankConfig) *initConfig;
  __typeof__(ncclCommInitRankScalable) *initScalable;
  __typeof__(ncclCommInitAll) *initAll;
  __typeof__(ncclCommSplit) *split;
  __typeof__(ncclCommShrink) *shrink;
  __typeof__(ncclCommGrow) *grow;
  __typeof__(ncclCommGetAsyncError) *asyncError;
  __typeof__(ncclCommDestroy) *destroy;
  __typeof__(ncclCommAbort) *abort;
  __typeof__(ncclCommFinalize) *finalize;
  __typeof__(ncclCommRevoke) *revoke;
  void *(*open)(const char *file, int mode); /* dlopen */
};
extern const struct client client;

#endif
