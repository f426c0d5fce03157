/* What a group finds of NCCL: this program is the NCCL, with the functions that a release has.
 *
 *   SYMBOLS_VERSION      what ncclGetVersion says
 *   SYMBOLS_WINDOWS      it has windows
 *   SYMBOLS_NO_GATHER    it lacks what every group needs */
#include "nccl_symbols.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#define NCCL_FUNCTION(name)                                                                                  \
  int name(void);                                                                                            \
  __attribute__((visibility("default"))) int name(void) {                                                    \
    return 0;                                                                                                \
  }

int ncclGetVersion(int *version);
__attribute__((visibility("default"))) int ncclGetVersion(int *version) {
  *version = SYMBOLS_VERSION;
  return 0;
}
NCCL_FUNCTION(ncclGetErrorString)
NCCL_FUNCTION(ncclCommCount)
NCCL_FUNCTION(ncclCommUserRank)
NCCL_FUNCTION(ncclCommCuDevice)
#ifndef SYMBOLS_NO_GATHER
NCCL_FUNCTION(ncclAllGather)
#endif
#if SYMBOLS_VERSION >= 21900
NCCL_FUNCTION(ncclCommGetAsyncError)
NCCL_FUNCTION(ncclMemAlloc)
NCCL_FUNCTION(ncclMemFree)
#endif
#ifdef SYMBOLS_WINDOWS
NCCL_FUNCTION(ncclCommWindowRegister)
NCCL_FUNCTION(ncclCommWindowDeregister)
NCCL_FUNCTION(ncclGetPeerDevicePointer)
#endif

static void test_symbols(void **state) {
  (void)state;
  const ncclSymbols_t *found = NULL;
#ifdef SYMBOLS_NO_GATHER
  assert_int_equal(nccl_symbols_find(&found), ultraepInvalidUsage);
  assert_null(found);
  assert_string_equal(ultraepGetLastError(),
                      "NCCL 22907 has no ncclAllGather: groups need NCCL 2.19 or later");
#else
  int version = 0;
  assert_int_equal(nccl_symbols_find(&found), ultraepSuccess);
  assert_true(found->GetVersion && found->GetErrorString && found->CommCount && found->CommUserRank &&
              found->CommCuDevice && found->AllGather);
  assert_int_equal(found->GetVersion(&version), 0);
  assert_int_equal(version, SYMBOLS_VERSION);
#ifdef SYMBOLS_WINDOWS
  assert_int_equal(found->hasWindows, SYMBOLS_VERSION >= 22900);
#else
  assert_false(found->hasWindows);
#endif
  assert_int_equal(found->CommGetAsyncError != NULL, SYMBOLS_VERSION >= 21900);
#endif
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_symbols)};
  return cmocka_run_group_tests_name("nccl_symbols", tests, NULL, NULL);
}
