#include "takeover_loader.h"

#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

typedef void *(*loader_open_fn)(const char *file, int mode);

static _Atomic(const void *) loaderOpen, loaderSymbol;

/* For a file that the caller's place does not matter for. */
static void *loader_open(const char *file, int mode) {
  loader_open_fn original = (loader_open_fn)atomic_load_explicit(&loaderOpen, memory_order_relaxed);
  void *handle = original(file, mode);

  if (handle) takeover_look_again();
  return handle;
}

#if defined(__x86_64__) || defined(__aarch64__)
/* Each hook asks its chooser, with the caller's arguments, and jumps with these to what it is told, so that
 * the return address is still the caller's. Only the two arguments and, on aarch64, the link register are to
 * be kept. */
const void *loader_open_choose(const char *file, int mode);
const void *loader_symbol_choose(void *handle, const char *name);
void loader_open_hook(void);
void loader_symbol_hook(void);

/* A bare name is searched for where the caller's RUNPATH says; "$" may stand for the caller's folder. */
__attribute__((used, visibility("hidden"))) const void *loader_open_choose(const char *file, int mode) {
  (void)mode;
  if (!file || (strchr(file, '/') && !strchr(file, '$'))) return (const void *)loader_open;
  takeover_look_later();
  return atomic_load_explicit(&loaderOpen, memory_order_relaxed);
}

__attribute__((used, visibility("hidden"))) const void *loader_symbol_choose(void *handle, const char *name) {
  (void)handle, (void)name;
  takeover_look_pending();
  return atomic_load_explicit(&loaderSymbol, memory_order_relaxed);
}

#if defined(__x86_64__)
#define LOADER_HOOK(hook, choose)                                                                            \
  __asm__(".pushsection .text\n"                                                                             \
          ".hidden " #hook "\n.globl " #hook "\n.type " #hook ", @function\n.balign 16\n" #hook ":\n"        \
          ".cfi_startproc\n"                                                                                 \
          "endbr64\n"                                                                                        \
          "pushq %rdi\n.cfi_adjust_cfa_offset 8\n"                                                           \
          "pushq %rsi\n.cfi_adjust_cfa_offset 8\n"                                                           \
          "subq $8, %rsp\n.cfi_adjust_cfa_offset 8\n"                                                        \
          "call " #choose "\n"                                                                               \
          "addq $8, %rsp\n.cfi_adjust_cfa_offset -8\n"                                                       \
          "popq %rsi\n.cfi_adjust_cfa_offset -8\n"                                                           \
          "popq %rdi\n.cfi_adjust_cfa_offset -8\n"                                                           \
          "jmp *%rax\n"                                                                                      \
          ".cfi_endproc\n.size " #hook ", . - " #hook "\n.popsection\n")
#else
#define LOADER_HOOK(hook, choose)                                                                            \
  __asm__(".pushsection .text\n"                                                                             \
          ".hidden " #hook "\n.globl " #hook "\n.type " #hook ", %function\n.balign 16\n" #hook ":\n"        \
          ".cfi_startproc\n"                                                                                 \
          "hint #34\n" /* bti c */                                                                           \
          "stp x29, x30, [sp, #-32]!\n.cfi_def_cfa_offset 32\n.cfi_offset 29, -32\n.cfi_offset 30, -24\n"    \
          "mov x29, sp\n"                                                                                    \
          "stp x0, x1, [sp, #16]\n"                                                                          \
          "bl " #choose "\n"                                                                                 \
          "mov x16, x0\n"                                                                                    \
          "ldp x0, x1, [sp, #16]\n"                                                                          \
          "ldp x29, x30, [sp], #32\n.cfi_def_cfa_offset 0\n.cfi_restore 29\n.cfi_restore 30\n"               \
          "br x16\n"                                                                                         \
          ".cfi_endproc\n.size " #hook ", . - " #hook "\n.popsection\n")
#endif

LOADER_HOOK(loader_open_hook, loader_open_choose);
LOADER_HOOK(loader_symbol_hook, loader_symbol_choose);

uintptr_t takeover_loader_hook(int call, const void *original) {
  if (!original) return 0;
  atomic_store(call == TAKEOVER_LOADER_DLOPEN ? &loaderOpen : &loaderSymbol, original);
  return call == TAKEOVER_LOADER_DLOPEN ? (uintptr_t)loader_open_hook : (uintptr_t)loader_symbol_hook;
}
#else
uintptr_t takeover_loader_hook(int call, const void *original) {
  (void)call, (void)original, (void)loader_open;
  return 0;
}
#endif
