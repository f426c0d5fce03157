/* Whether all ranks of a communicator have called us to make it. Where NCCL loads the library by making a
 * rank's first communicator, that call does not pass here, while those of other ranks may, which have had one
 * before. What all ranks must do together must then not begin.
 *
 * Each rank that makes one from unique ids holds a socket of the abstract namespace, named after them and the
 * rank, from before NCCL's call. NCCL makes a communicator only when all have called, so from then on every
 * rank finds all the names there are; ranks on other hosts have none here. A name stays until its rank has
 * closed it: where all are found, after something for which all had to look. */
#ifndef ULTRAEP_ATTENDANCE_H_
#define ULTRAEP_ATTENDANCE_H_

#include <stdbool.h>
#include <stdint.h>

typedef struct attendance attendance_t;

/* Before the call. id: the same on all ranks, and no other communicator's. Never null: one that cannot be
 * held, or is of 0 ranks, is never full. */
attendance_t *attendance_open(uint64_t id, int nRanks, int rank);
/* When NCCL has made the communicator. Null: there was no need to ask, all have called. */
bool attendance_is_full(const attendance_t *attendance);
/* May be null. */
void attendance_close(attendance_t *attendance);

#endif
