/* Takes over the calls of p2p.h from a process that knows nothing of us: points the slots (elf_slots.h) of
 * all loaded objects, but NCCL's and our own, at our functions.
 *
 * Objects loaded later are looked at when dlopen returns, whose slots are taken over too. What dlopen finds
 * for a bare file name depends on who calls it (RUNPATH), so there the original returns straight to its
 * caller, and the look follows at the next dlsym, dlopen, start of a group or new communicator: before a
 * loaded object can be called, but for what its constructors hand out.
 *
 * Left alone, and said once in the log: slots that lead elsewhere than to the NCCL that loaded us (another
 * library that takes the calls, a second NCCL) and pages that cannot be written. Calls without a slot (an
 * NCCL linked statically, dlsym) cannot be seen; where there is no slot at all, that is said. Other link-map
 * namespaces (dlmopen) are not looked at.
 *
 * Once something is taken over, this library and NCCL stay loaded until the process ends: NCCL closes its
 * plugins in ncclCommDestroy, to which our function must return. */
#ifndef ULTRAEP_TAKEOVER_H_
#define ULTRAEP_TAKEOVER_H_

#include "nccl_tuner_abi.h"

#include <stdbool.h>

/* To be called for every communicator that NCCL tells of; any thread. The first call takes over, later ones
 * look for what came since. logger: NCCL's; null leaves the one told before. Does nothing where the setting
 * is off, the preload library has the calls, or no NCCL is found. */
void takeover_start(nccl_abi_logger_t logger);
/* The same, by another address in NCCL, where there may be no logger. */
void takeover_start_at(const void *inside, nccl_abi_logger_t logger);

/* Whether libultraep-preload.so counts in this process: the plugin then does not. */
bool takeover_is_preloaded(void);

/* Gives back every slot that still is ours. Also done when the library is unloaded. */
void takeover_undo(void);

/* Slots that now lead to us; dlopen's and dlsym's are not counted. */
size_t takeover_slots(void);

#endif
