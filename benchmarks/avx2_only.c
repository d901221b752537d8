// Hides AVX-512, AMX and VNNI from the programs of a Linux process, so that every runtime takes its AVX2
// code:
//
//   mkdir -p build && cc -O2 -shared -fPIC benchmarks/avx2_only.c -o build/avx2_only.so
//   LD_PRELOAD=$PWD/build/avx2_only.so GATEDCONV_ISA=avx2 python -m benchmarks.shipped
//
// Environment variables do that for PyTorch, oneDNN and our engine alone. The kernel can make the instruction
// CPUID fault (arch_prctl(2), ARCH_CPUID); the handler answers it with the bits below cleared. Needs an Intel
// CPU whose /proc/cpuinfo has cpuid_fault. Clock and caches stay those of the CPU that it is.
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { ARCH_SET_CPUID = 0x1012, REGISTERS = 4 };

static struct sigaction previous;

static long allow_cpuid(int allowed) {
  return syscall(SYS_arch_prctl, ARCH_SET_CPUID, allowed);
}

// Bits of leaf 7, by the names of the Intel SDM, volume 2, CPUID.
static void hide(unsigned leaf, unsigned part, unsigned r[REGISTERS]) {
  if (leaf == 7 && part == 0) {
    r[1] &= ~(1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 |
              1u << 31);                                            // AVX512 F to VL
    r[2] &= ~(1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14);  // VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ
    r[3] &= ~(1u << 2 | 1u << 3 | 1u << 8 | 7u << 22);  // 4VNNIW, 4FMAPS, VP2INTERSECT; AMX, AVX512_FP16
    r[3] &= ~(1u << 25);                                // AMX_INT8
  } else if (leaf == 7 && part == 1) {
    r[0] &= ~(1u << 4 | 1u << 5 | 1u << 21 | 1u << 23);  // AVX_VNNI, AVX512_BF16, AMX_FP16, AVX_IFMA
    r[3] &= ~(1u << 4 | 1u << 5 | 1u << 8 | 1u << 10 |
              1u << 19);  // AVX_VNNI_INT8, AVX_NE_CONVERT, AMX, INT16, AVX10
  }
}

static void answer(int signal, siginfo_t* info, void* context) {
  greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
  const unsigned char* code = (const unsigned char*)registers[REG_RIP];
  // Another fault: as without this library.
  if (info->si_code != SI_KERNEL || code[0] != 0x0f || code[1] != 0xa2) {
    sigaction(signal, &previous, NULL);
    return;
  }
  unsigned r[REGISTERS], leaf = (unsigned)registers[REG_RAX], part = (unsigned)registers[REG_RCX];
  allow_cpuid(1);
  __cpuid_count(leaf, part, r[0], r[1], r[2], r[3]);
  allow_cpuid(0);
  hide(leaf, part, r);
  registers[REG_RAX] = r[0];
  registers[REG_RBX] = r[1];
  registers[REG_RCX] = r[2];
  registers[REG_RDX] = r[3];
  registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void start(void) {
  struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER};
  sigaction(SIGSEGV, &action, &previous);
  if (allow_cpuid(0) != 0) {
    fputs("avx2_only: this CPU or kernel cannot make CPUID fault\n", stderr);
    exit(1);
  }
}
