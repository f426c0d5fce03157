/* Which communicator is it? A 64-bit id that all ranks of a communicator have alike, in whatever process, so
 * that their traffic can be put together. 0: not known.
 *
 * Told: NCCL gives its own id to tuners (2.28 on) and profilers (2.27 on), with no handle but with the place
 * where the role's context is to be kept: a field of the communicator. Its handle is where that field's
 * offset, the same in all of them, leads back to; the first one found, the nearest below, says the offset.
 *
 * Ours, where NCCL tells none: a hash of the unique ids at creation; of a parent's id, the number of its
 * children so far and the colour for those made from others. It needs that creation was seen.
 *
 * A told id comes first, on all ranks, for all have the same NCCL and the same plugins. */
#ifndef ULTRAEP_COMM_ID_H_
#define ULTRAEP_COMM_ID_H_

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum { COMM_TOLD_TUNER, COMM_TOLD_PROFILER, COMM_TOLD_ROLES } commToldRole_t;

/* What NCCL told one role of one rank of a communicator. The owner keeps the memory until it has removed it.
 */
typedef struct comm_told {
  uintptr_t place; /* the address of the role's context in the communicator */
  uint64_t id;     /* 0: not told */
  int rank;        /* -1: not told */
  int nRanks;      /* 0: not told */
  commToldRole_t role;
  _Atomic(const void *) comm; /* null: not known yet */
  atomic_bool ended;          /* no operation may follow */
  struct comm_told *next, *previous;
} comm_told_t;

/* Any thread. told: place, id, rank, nRanks and role are set. */
void comm_told_add(comm_told_t *told);
/* The communicator goes. Returns its handle, null where it never was known. */
const void *comm_told_remove(comm_told_t *told);
/* The handle, or null while it is not known. */
const void *comm_told_comm(comm_told_t *told);

/* The communicator's id, told or ours. */
uint64_t comm_id_find(const void *comm, int rank, int nRanks);
/* No operation may follow; ids stay. */
void comm_id_end(const void *comm);
/* The communicator goes. */
void comm_id_forget(const void *comm);

/* Sets our id of a communicator that was made just now. 0, and where memory is short: it is not known. */
void comm_id_set(const void *comm, uint64_t id);
/* Our id of the parent's next child; all ranks of the parent must ask. 0: the parent's is not known. */
uint64_t comm_id_child(const void *parent, uint64_t kind);
/* Never 0. */
uint64_t comm_id_hash(uint64_t seed, const void *bytes, size_t nBytes);

#endif
