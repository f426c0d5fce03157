#include "error.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char lastError[ERROR_TEXT_BYTES];

void error_record(const char *format, ...) {
  /* Formatted aside first: an argument may be the last message itself. */
  char text[ERROR_TEXT_BYTES];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof(text), format, args);
  va_end(args);
  snprintf(lastError, sizeof(lastError), "%s", text);
}

const char *error_text(void) {
  return lastError;
}

const char *ultraepGetLastError(void) {
  return lastError;
}

const char *ultraepGetErrorString(ultraepResult_t result) {
  switch (result) {
  case ultraepSuccess:
    return "no error";
  case ultraepUnhandledCudaError:
    return "unhandled CUDA error";
  case ultraepSystemError:
    return "system error";
  case ultraepInternalError:
    return "internal error";
  case ultraepInvalidArgument:
    return "invalid argument";
  case ultraepInvalidUsage:
    return "invalid usage";
  case ultraepRemoteError:
    return "another rank aborted, left or failed";
  case ultraepInProgress:
    return "in progress";
  case ultraepTimeout:
    return "timeout: a rank did not come";
  case ultraepCapacityExceeded:
    return "capacity exceeded";
  }
  return "unknown result code";
}

ultraepResult_t ultraepGetVersion(int *version) {
  if (!version) return error_set(ultraepInvalidArgument, "ultraepGetVersion: version is null");
  *version = ULTRAEP_VERSION_CODE;
  return ultraepSuccess;
}
