/* The loader's two calls, taken over so as to notice what is loaded. What they find may depend on the object
 * that calls them, which they know by their return address: so they are left to return there, by a jump,
 * wherever it matters. */
#ifndef ULTRAEP_TAKEOVER_LOADER_H_
#define ULTRAEP_TAKEOVER_LOADER_H_

#include <stdint.h>

enum { TAKEOVER_LOADER_DLOPEN, TAKEOVER_LOADER_DLSYM };

/* Our function for the call; 0 where there is none for this processor. original: where it goes on. */
uintptr_t takeover_loader_hook(int call, const void *original);

/* takeover.c's. At once; where one is pending; leave one to the next that asks for pending ones. */
void takeover_look_again(void);
void takeover_look_pending(void);
void takeover_look_later(void);

#endif
