/* Runs a plan on the caller's threads, in several ways, and compares the outputs bit for bit with the library's own
 * threads: threads NET.plan. Prints how many calls there were. */
#include <gatedconv_plan.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { THREADS = 3 };

typedef struct {
  gatedconv_task task;
  void* context;
  int index;
} Job;

static void* run_job(void* given) {
  const Job* job = given;
  job->task(job->context, job->index);
  return NULL;
}

static void joined(void* calls, int count, gatedconv_task task, void* context) {
  pthread_t threads[THREADS];
  Job jobs[THREADS];
  ++*(int*)calls;
  if (count > THREADS) abort();
  for (int i = 0; i < count; ++i) {
    jobs[i] = (Job){task, context, i};
    if (pthread_create(&threads[i], NULL, run_job, &jobs[i])) abort();
  }
  for (int i = 0; i < count; ++i) pthread_join(threads[i], NULL);
}

static void forwards(void* calls, int count, gatedconv_task task, void* context) {
  ++*(int*)calls;
  for (int i = 0; i < count; ++i) task(context, i);
}

static void backwards(void* calls, int count, gatedconv_task task, void* context) {
  ++*(int*)calls;
  for (int i = count; i-- > 0;) task(context, i);
}

/* What it leaves out and what nobody asked for is the library's to notice. */
static void careless(void* calls, int count, gatedconv_task task, void* context) {
  ++*(int*)calls;
  task(context, count);
  task(context, -1);
}

int main(int argc, char** argv) {
  gatedconv_plan* plan = argc == 2 ? gatedconv_plan_open(argv[1]) : NULL;
  if (!plan) return fprintf(stderr, "%s\n", gatedconv_plan_error()), 1;
  const gatedconv_parallel_for ways[] = {NULL, joined, forwards, backwards, careless};
  int calls = 0;
  for (int64_t images = 1; images <= 8; images += 7) {
    int64_t in[4], out[4];
    gatedconv_plan_input_size(plan, in);
    in[0] = images;
    gatedconv_plan_output_size(plan, in, out);
    const int64_t inputs = in[0] * in[1] * in[2] * in[3], outputs = out[0] * out[1] * out[2] * out[3];
    float* image = malloc((size_t)inputs * sizeof(float));
    float* expected = malloc((size_t)outputs * sizeof(float));
    float* found = malloc((size_t)outputs * sizeof(float));
    for (int64_t i = 0; i < inputs; ++i) image[i] = (float)(i * 37 % 101) / 50 - 1;
    if (gatedconv_plan_run(plan, image, in, NULL, expected, outputs, 1)) return 1;
    for (size_t way = 0; way < sizeof(ways) / sizeof(*ways); ++way) {
      memset(found, 0xff, (size_t)outputs * sizeof(float));
      if (gatedconv_plan_run_on(plan, image, in, NULL, found, outputs, THREADS, ways[way], &calls)) return 1;
      if (memcmp(found, expected, (size_t)outputs * sizeof(float)))
        return fprintf(stderr, "way %zu, %d images: another output\n", way, (int)images), 1;
    }
    free(image), free(expected), free(found);
  }
  gatedconv_plan_close(plan);
  printf("%d\n", calls);
  return 0;
}
