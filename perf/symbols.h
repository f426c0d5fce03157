/* Functions of libraries that are loaded at run time. */
#ifndef ULTRAEP_PERF_SYMBOLS_H_
#define ULTRAEP_PERF_SYMBOLS_H_

#include <stddef.h>

typedef struct {
  const char *name;
  void **slot; /* the function pointer to be set */
} perfSymbol_t;

/* Sets all slots: null, or the name that the library lacks. */
const char *perfSymbolsFind(void *library, const perfSymbol_t *wanted, size_t count);

#endif
