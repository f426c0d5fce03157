/* Carving one block into typed arrays, in two passes of the same code: with base null to learn the bytes,
 * then with the block. So a layout is written once, and a group or a route is one allocation. */
#ifndef ULTRAEP_ARENA_H_
#define ULTRAEP_ARENA_H_

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#define ARENA_ALIGNMENT 256

typedef struct {
  unsigned char *base;
  size_t used;
} arena_t;

static inline void *arena_take(arena_t *arena, size_t count, size_t bytes) {
  void *start = arena->base ? arena->base + arena->used : NULL;
  arena->used += (count * bytes + ARENA_ALIGNMENT - 1) / ARENA_ALIGNMENT * ARENA_ALIGNMENT;
  return start;
}

/* Uninitialised memory aligned to ARENA_ALIGNMENT; null when there is none. Pages are touched by first use
 * only. */
static inline void *arena_alloc(size_t bytes) {
  if (bytes > SIZE_MAX - ARENA_ALIGNMENT) return NULL;
  size_t rounded = (bytes + ARENA_ALIGNMENT - 1) / ARENA_ALIGNMENT * ARENA_ALIGNMENT;
  return aligned_alloc(ARENA_ALIGNMENT, rounded ? rounded : ARENA_ALIGNMENT);
}

#endif
