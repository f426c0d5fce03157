/* The slots through which a loaded ELF object calls, or takes the address of, functions of other objects: the
 * targets of its JUMP_SLOT and GLOB_DAT relocations. x86_64 and aarch64; on others no object has slots. */
#ifndef ULTRAEP_ELF_SLOTS_H_
#define ULTRAEP_ELF_SLOTS_H_

#include <link.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct elf_relocations {
  const ElfW(Rela) * entries;
  size_t count;
};

struct elf_object {
  uintptr_t base;      /* what is added to the file's addresses */
  uintptr_t low, high; /* what its segments span, base included */
  const ElfW(Sym) * symbols;
  const char *strings;
  size_t stringBytes;
  struct elf_relocations plt, data;
};

struct elf_slot {
  uintptr_t *address;
  const char *name;
  bool jump;    /* JUMP_SLOT: may be bound at the first call only */
  bool defined; /* the object has a definition of its own */
  bool weak;
};

/* To be used in a callback of dl_iterate_phdr, which keeps the object from being unmapped. False for an
 * object that has no slots, or is not as the loader would have it. */
bool elf_object_read(const struct dl_phdr_info *info, struct elf_object *object);
bool elf_object_holds(const struct elf_object *object, const void *address);
void elf_slots_walk(const struct elf_object *object, void (*visit)(const struct elf_slot *, void *),
                    void *argument);

/* Writes one slot; a read-only page (RELRO) is writable meanwhile. 0 or an errno value.
 *
 * A page counts as read-only only where it is so now: the loader protects an object's pages once it has bound
 * all of its slots, and must find them writable until then. */
int elf_slot_write(uintptr_t *address, uintptr_t value);

#endif
