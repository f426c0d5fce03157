/* The traffic record: per communicator a rank x rank matrix of bytes and calls. Exact, and cheap on the data
 * path: no lock, no allocation, no system call per operation. A process knows its own ranks' rows: what they
 * send and what they receive.
 *
 * Windows of time cost the data path nothing either: traffic_count only adds to counters that never fall, and
 * a window is the difference of two looks at them. Looks are taken by the writer's thread, which runs where a
 * file is asked for, and by whoever opens, closes or reads a record; a window lasts from look to look, at
 * least ULTRAEP_TRAFFIC_WINDOW_S seconds, and its true length is recorded with it. */
#ifndef ULTRAEP_TRAFFIC_H_
#define ULTRAEP_TRAFFIC_H_

#include "nccl_tuner_abi.h"

#include <stddef.h>
#include <stdint.h>

typedef struct trafficComm trafficComm_t;

typedef enum { TRAFFIC_SEND, TRAFFIC_RECV } trafficDirection_t;

/* The record of one rank of a communicator; null where there is no memory (traffic is then not counted). comm
 * is a key, never looked into. hash tells communicators apart in outputs (0: not known); ranks of one
 * communicator in one process are put together by it. Opening what is open already gives the record there is,
 * so that two threads may both find a communicator new; if rank or nRanks differ, the address is another
 * communicator's by now, and the older record ends. */
trafficComm_t *traffic_comm_open(const void *comm, uint64_t hash, int rank, int nRanks);
/* Finds what traffic_comm_open made; null if there is none. No lock, safe beside open and close of others. */
trafficComm_t *traffic_comm_find(const void *comm);
/* Ends the record: the log line is written, and files are at the next of their times or at the process's end.
 * Null, and what has ended already, are allowed. */
void traffic_comm_close(trafficComm_t *comm);

/* Counts one operation between the record's rank and peer. Any thread. Null, and a peer that is none, count
 * nothing. Safe beside the record's own close (a watchdog aborts what a worker uses): the operation is then
 * counted or not, and no memory is touched that is gone. */
void traffic_count(trafficComm_t *comm, trafficDirection_t direction, int peer, uint64_t bytes);
/* The same for one operation with every peer, the rank itself included; and for one both ways. */
void traffic_count_all(trafficComm_t *comm, trafficDirection_t direction, uint64_t bytes);
void traffic_count_all_to_all(trafficComm_t *comm, uint64_t bytes);
/* -1 for null. */
int traffic_comm_rank(const trafficComm_t *comm);

/* The second source: an operation that NCCL's profiler interface told of. What a cell shows is the larger of
 * both sources, so that an operation that both saw counts once, and one that only one of them saw is there.
 */
void traffic_count_event(trafficComm_t *comm, trafficDirection_t direction, int peer, uint64_t bytes);
/* Gives a record room for more ranks, where their number was not known. Nobody else may count in it. Returns
 * the record to go on with; where memory is short, the old one. */
trafficComm_t *traffic_comm_grow(trafficComm_t *comm, int nRanks);

/* Where log lines go: NCCL's logger, the last one told; null: nowhere, as at first. */
void traffic_logger_set(nccl_abi_logger_t logger);

#endif
