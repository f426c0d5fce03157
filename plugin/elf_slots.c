#include "elf_slots.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__x86_64__)
enum { ELF_JUMP = R_X86_64_JUMP_SLOT, ELF_DATA = R_X86_64_GLOB_DAT };
#elif defined(__aarch64__)
enum { ELF_JUMP = R_AARCH64_JUMP_SLOT, ELF_DATA = R_AARCH64_GLOB_DAT };
#else
enum { ELF_JUMP = -1, ELF_DATA = -1 };
#endif

/* ---- the dynamic section ---- */
static bool elf_object_spans(const struct elf_object *object, uintptr_t address, size_t bytes) {
  return address >= object->low && address <= object->high && bytes <= object->high - address;
}

/* The loader adds the base to the pointers of a dynamic section, but not where the section is read-only. The
 * file's addresses are below any base but 0, so that only one reading lies in the object. Null if none does.
 */
static const void *elf_object_pointer(const struct elf_object *object, uintptr_t pointer, size_t bytes) {
  if (!elf_object_spans(object, pointer, bytes)) pointer += object->base;
  return elf_object_spans(object, pointer, bytes) ? (const void *)pointer : NULL;
}

static const ElfW(Dyn) * elf_object_segments(const struct dl_phdr_info *info, struct elf_object *object) {
  const ElfW(Dyn) *dynamic = NULL;

  object->base = info->dlpi_addr;
  object->low = UINTPTR_MAX;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const ElfW(Phdr) *header = &info->dlpi_phdr[i];
    uintptr_t start = object->base + header->p_vaddr;

    if (header->p_type == PT_DYNAMIC) dynamic = (const ElfW(Dyn) *)start;
    if (header->p_type != PT_LOAD) continue;
    if (start < object->low) object->low = start;
    if (start + header->p_memsz > object->high) object->high = start + header->p_memsz;
  }
  return dynamic;
}

/* Relative relocations come first and have no symbol: the loader's own short cut. */
static void elf_relocations_skip(struct elf_relocations *relocations, size_t relative) {
  if (relative > relocations->count) relative = relocations->count;
  if (!relocations->entries) return;
  relocations->entries += relative;
  relocations->count -= relative;
}

bool elf_object_read(const struct dl_phdr_info *info, struct elf_object *object) {
  uintptr_t symbols = 0, strings = 0, plt = 0, data = 0, pltType = DT_RELA;
  size_t pltBytes = 0, dataBytes = 0, relative = 0;
  const ElfW(Dyn) * dynamic;

  *object = (struct elf_object){0};
  dynamic = elf_object_segments(info, object);
  if (!dynamic) return false;
  for (; dynamic->d_tag != DT_NULL; dynamic++) {
    switch (dynamic->d_tag) {
    case DT_SYMTAB:
      symbols = dynamic->d_un.d_ptr;
      break;
    case DT_STRTAB:
      strings = dynamic->d_un.d_ptr;
      break;
    case DT_STRSZ:
      object->stringBytes = dynamic->d_un.d_val;
      break;
    case DT_JMPREL:
      plt = dynamic->d_un.d_ptr;
      break;
    case DT_PLTRELSZ:
      pltBytes = dynamic->d_un.d_val;
      break;
    case DT_PLTREL:
      pltType = dynamic->d_un.d_val;
      break;
    case DT_RELA:
      data = dynamic->d_un.d_ptr;
      break;
    case DT_RELASZ:
      dataBytes = dynamic->d_un.d_val;
      break;
    case DT_RELACOUNT:
      relative = dynamic->d_un.d_val;
      break;
    default:
      break;
    }
  }
  if (!symbols || !strings || pltType != DT_RELA) return false;
  object->symbols = elf_object_pointer(object, symbols, sizeof(*object->symbols));
  object->strings = elf_object_pointer(object, strings, object->stringBytes);
  if (plt) object->plt.entries = elf_object_pointer(object, plt, pltBytes);
  if (data) object->data.entries = elf_object_pointer(object, data, dataBytes);
  object->plt.count = object->plt.entries ? pltBytes / sizeof(ElfW(Rela)) : 0;
  object->data.count = object->data.entries ? dataBytes / sizeof(ElfW(Rela)) : 0;
  elf_relocations_skip(&object->data, relative);
  return object->symbols && object->strings && object->plt.count + object->data.count > 0;
}

bool elf_object_holds(const struct elf_object *object, const void *address) {
  return elf_object_spans(object, (uintptr_t)address, 1);
}

/* ---- slots ---- */
static void elf_relocations_walk(const struct elf_object *object, const struct elf_relocations *relocations,
                                 void (*visit)(const struct elf_slot *, void *), void *argument) {
  for (size_t i = 0; i < relocations->count; i++) {
    const ElfW(Rela) *entry = &relocations->entries[i];
    const int type = (int)ELF64_R_TYPE(entry->r_info);
    const uintptr_t address = object->base + entry->r_offset;
    const ElfW(Sym) * symbol;

    if (type != ELF_JUMP && type != ELF_DATA) continue;
    symbol = &object->symbols[ELF64_R_SYM(entry->r_info)];
    if (symbol->st_name >= object->stringBytes || address % sizeof(uintptr_t) != 0) continue;
    if (!elf_object_spans(object, address, sizeof(uintptr_t))) continue;
    visit(
        &(struct elf_slot){
            .address = (uintptr_t *)address,
            .name = object->strings + symbol->st_name,
            .jump = type == ELF_JUMP,
            .defined = symbol->st_shndx != SHN_UNDEF,
            .weak = ELF64_ST_BIND(symbol->st_info) == STB_WEAK,
        },
        argument);
  }
}

void elf_slots_walk(const struct elf_object *object, void (*visit)(const struct elf_slot *, void *),
                    void *argument) {
  elf_relocations_walk(object, &object->plt, visit, argument);
  elf_relocations_walk(object, &object->data, visit, argument);
}

/* ---- writing ---- */
/* PROT_ bits of the mapping that holds the address; -1 if the kernel does not say. */
static int elf_page_protection(uintptr_t address) {
  FILE *maps = fopen("/proc/self/maps", "re");
  int protection = -1;
  size_t bytes = 0;
  char *line = NULL;

  if (!maps) return -1;
  while (protection < 0 && getline(&line, &bytes, maps) > 0) {
    char *rest;
    uintptr_t start = strtoull(line, &rest, 16), end;

    if (*rest != '-') continue;
    end = strtoull(rest + 1, &rest, 16);
    if (address < start || address >= end || rest[0] != ' ') continue;
    protection = (rest[1] == 'r' ? PROT_READ : 0) | (rest[2] == 'w' ? PROT_WRITE : 0) |
                 (rest[3] == 'x' ? PROT_EXEC : 0);
  }
  free(line);
  fclose(maps);
  return protection;
}

int elf_slot_write(uintptr_t *address, uintptr_t value) {
  const size_t pageBytes = (size_t)sysconf(_SC_PAGESIZE);
  void *page = (void *)((uintptr_t)address & ~(pageBytes - 1));
  const int protection = elf_page_protection((uintptr_t)address);

  if (protection < 0) return ENOENT;
  if (!(protection & PROT_WRITE) && mprotect(page, pageBytes, protection | PROT_WRITE) != 0) return errno;
  /* One store: other threads call through the slot meanwhile. */
  __atomic_store_n(address, value, __ATOMIC_RELEASE);
  if (!(protection & PROT_WRITE) && mprotect(page, pageBytes, protection) != 0) return errno;
  return 0;
}
