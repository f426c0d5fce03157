#include "symbols.h"

#include <dlfcn.h>
#include <string.h>

const char *perfSymbolsFind(void *library, const perfSymbol_t *wanted, size_t count) {
  for (size_t i = 0; i < count; i++) {
    void *symbol = dlsym(library, wanted[i].name);
    if (symbol == NULL) return wanted[i].name;
    memcpy(wanted[i].slot, &symbol, sizeof(symbol));
  }
  return NULL;
}
