/* Opens a plan and runs it while one request for memory after the other fails, alone or with all that follow
 * it: no_memory NET.plan THREADS. Whatever fails has to say so, leave nothing behind, and nothing else may
 * happen. Prints how many requests have failed. */
#include <gatedconv_plan.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);
extern void __libc_free(void*);

static atomic_long requests, blocks;      /* made so far; held now */
static atomic_long first = -1, last = -1; /* the requests that fail */

static void* give(void* block) {
  if (block) atomic_fetch_add(&blocks, 1);
  return block;
}

static int fails(void) {
  const long request = atomic_fetch_add(&requests, 1);
  return request >= first && request <= last;
}

void* malloc(size_t size) {
  return fails() ? NULL : give(__libc_malloc(size));
}
void* calloc(size_t count, size_t size) {
  return fails() ? NULL : give(__libc_calloc(count, size));
}
void* aligned_alloc(size_t alignment, size_t size) {
  return fails() ? NULL : give(__libc_memalign(alignment, size));
}
void* realloc(void* block, size_t size) {
  if (fails()) return NULL;
  if (!block) return give(__libc_malloc(size));
  return __libc_realloc(block, size);
}
void free(void* block) {
  if (block) atomic_fetch_sub(&blocks, 1);
  __libc_free(block);
}

static char content[1 << 20];
static float image[1 << 16], output[1 << 12], expected[1 << 12];

/* 1 if everything worked, 0 if something was refused for want of memory; ends the program otherwise. */
static int attempt(size_t size, int threads) {
  int64_t in[4], out[4];
  char text[256];
  gatedconv_plan* plan = gatedconv_plan_open_memory(content, size);
  int worked = plan != NULL;
  if (plan) {
    gatedconv_plan_input_size(plan, in);
    const int rank = gatedconv_plan_output_size(plan, in, out);
    worked = rank > 0 && gatedconv_plan_workspace(plan, in, threads) > 0 &&
             gatedconv_plan_describe(plan, in, threads, text, sizeof(text)) > 0 &&
             !gatedconv_plan_run(plan, image, in, NULL, output, out[0] * out[1] * out[2] * out[3], threads);
  }
  if (!worked && strcmp(gatedconv_plan_error(), "no memory"))
    fprintf(stderr, "refused for: %s\n", gatedconv_plan_error()), exit(1);
  gatedconv_plan_close(plan);
  gatedconv_plan_release();
  return worked;
}

int main(int argc, char** argv) {
  FILE* file = argc == 3 ? fopen(argv[1], "rb") : NULL;
  const size_t size = file ? fread(content, 1, sizeof(content), file) : 0;
  if (size == 0) return 1;
  fclose(file);
  const int threads = atoi(argv[2]);
  for (size_t i = 0; i < sizeof(image) / sizeof(*image); ++i) image[i] = (float)(i * 37 % 101) / 50 - 1;

  /* The threads are started, and the C library has its own memory, before anything is counted. */
  memset(output, 0xff, sizeof(output));
  if (!attempt(size, threads) || gatedconv_plan_open_memory("", 0)) return 1;
  memcpy(expected, output, sizeof(output));
  long held = blocks, failed = 0;
  for (int all = 0; all < 2; ++all) {
    for (long request = 0, worked = 0; !worked; ++request) {
      memset(output, 0xff, sizeof(output));
      first = requests + request;
      last = all ? (1L << 40) : first;
      worked = attempt(size, threads) && requests <= first;
      last = first = -1;
      failed += !worked;
      for (int wait = 0; blocks > held && wait < 5000; ++wait) nanosleep(&(struct timespec){0, 1000000}, NULL);
      const long now = blocks;
      if (now > held) return fprintf(stderr, "request %ld: %ld blocks left behind\n", request, now - held), 1;
      held = now; /* fewer: a thread that comes late to its work has let go of it */
    }
    if (memcmp(output, expected, sizeof(expected)) != 0) return fprintf(stderr, "another output\n"), 1;
  }
  printf("%ld\n", failed);
  return 0;
}
