/* Short messages, with a file descriptor if wanted, between ranks of one machine: what NCCL cannot carry.
 *
 * One abstract unix datagram socket a rank. Datagrams rather than connections: a rank needs one descriptor
 * whatever the number of its peers, nobody has to accept, a message is whole or not there at all, and a peer
 * that does not read costs its own queue only. The price is that a send may find that queue full.
 *
 * The kernel tells the sender's user; messages of other users are dropped, and so are those without the
 * receiver's token, a number that only those know who were told. Both ends must be in one network namespace.
 */
#ifndef ULTRAEP_PEER_SOCKET_H_
#define ULTRAEP_PEER_SOCKET_H_

#include "ultraep.h"

#define PEER_SOCKET_BYTES 256 /* most of one message */

/* What a peer must know to send: plain bytes, exchanged by other means. */
typedef struct {
  uint64_t name;  /* of the socket, random */
  uint64_t token; /* that messages to it must carry, random */
} peerAddress_t;

typedef struct {
  int fd;
  peerAddress_t address;
} peerSocket_t;

/* A socket that was never opened: closing it does nothing. */
#define PEER_SOCKET_NONE ((peerSocket_t){.fd = -1})

ultraepResult_t peer_socket_open(peerSocket_t *socket);
void peer_socket_close(peerSocket_t *socket);

/* Sends bytes (1..PEER_SOCKET_BYTES) and, unless fd is -1, a copy of the descriptor; the caller's stays open.
 * Never waits: ultraepInProgress, with no message recorded, when the peer's queue is full.
 * ultraepRemoteError: no such socket, here or any more. */
ultraepResult_t peer_socket_send(const peerSocket_t *self, const peerAddress_t *to, const void *data,
                                 size_t bytes, int fd);

/* Takes the next message; *bytes is its length, at most `capacity`, and *fd is the caller's to close, or -1.
 * Waits at most timeoutMs (0: not at all): ultraepTimeout, with no message recorded, when none came. A longer
 * message, or one whose descriptor is lost (too many open files), is an error and gone. */
ultraepResult_t peer_socket_receive(const peerSocket_t *self, void *data, size_t capacity, size_t *bytes,
                                    int *fd, int timeoutMs);

/* Tells machines apart, and within one machine process id namespaces and host names: two processes with this
 * and the process id in common are one. */
uint64_t peer_host_id(void);

#endif
