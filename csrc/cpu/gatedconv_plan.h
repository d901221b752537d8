/* Runs a network that `gatedconv export --format plan` has written: from C, without PyTorch.
 *
 * Nothing in a file is trusted: what is damaged, cut short, foreign or newer is refused with one line of
 * text. Functions that can fail return NULL or -1, and gatedconv_plan_error() returns the reason. A plan does
 * not change after it was opened, so several threads may run it at the same time, each with tensors of its
 * own. A process that was forked may keep using the plans of its parent.
 */
#ifndef GATEDCONV_PLAN_H
#define GATEDCONV_PLAN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Of this interface: another one has other functions or other arguments. It is the number in the name of the
 * shared library. */
#define GATEDCONV_PLAN_VERSION 1

/* Of the files that are read, program included. A newer file is refused with an error that names it. */
#define GATEDCONV_PLAN_FILE_VERSION 1

#define GATEDCONV_PLAN_API __attribute__((visibility("default")))

typedef struct gatedconv_plan gatedconv_plan;

/* GATEDCONV_PLAN_VERSION and GATEDCONV_PLAN_FILE_VERSION of the library. */
GATEDCONV_PLAN_API int gatedconv_plan_version(void);
GATEDCONV_PLAN_API int gatedconv_plan_file_version(void);

/* Why the last call of this thread that failed did so; never NULL, and valid until the thread's next call
 * that fails. */
GATEDCONV_PLAN_API const char* gatedconv_plan_error(void);

/* Reads a file, or `size` bytes of one, which may be freed afterwards. gatedconv_plan_close() frees the plan;
 * NULL is allowed there. */
GATEDCONV_PLAN_API gatedconv_plan* gatedconv_plan_open(const char* path);
GATEDCONV_PLAN_API gatedconv_plan* gatedconv_plan_open_memory(const void* bytes, size_t size);
GATEDCONV_PLAN_API void gatedconv_plan_close(gatedconv_plan* plan);

/* The size N, C, H, W that the plan was made for. C is fixed; other N, H and W may do: see output_size. */
GATEDCONV_PLAN_API void gatedconv_plan_input_size(const gatedconv_plan* plan, int64_t size[4]);

/* The output's size for an input of `input` (N, C, H, W). Returns its rank: 4 for N, C, H, W; 2 for N, C,
 * then 1, 1. */
GATEDCONV_PLAN_API int gatedconv_plan_output_size(const gatedconv_plan* plan, const int64_t input[4],
                                                  int64_t output[4]);

/* Bytes that a run takes in addition to its tensors, and keeps for the next run until
 * gatedconv_plan_release(). */
GATEDCONV_PLAN_API int64_t gatedconv_plan_workspace(const gatedconv_plan* plan, const int64_t input[4],
                                                    int threads);

/* Runs the network on the calling thread and up to `threads` - 1 of the library's own; 0 means one for every
 * core.
 *
 * input: float32 N, C, H, W of `size`, its strides counted in floats; stride NULL means contiguous.
 * output: room for `output_floats` floats, exactly as many as output_size returns; contiguous, not inside of
 * the input. Returns 0, or -1: `output` is unchanged, unless memory ran out during the run. */
GATEDCONV_PLAN_API int gatedconv_plan_run(const gatedconv_plan* plan, const float* input,
                                          const int64_t size[4], const int64_t stride[4], float* output,
                                          int64_t output_floats, int threads);

/* Calls task(context, i) once for every i from 0 to count - 1, on any threads, also one after the other in
 * any order, and returns when all calls have returned. */
typedef void (*gatedconv_task)(void* context, int index);
typedef void (*gatedconv_parallel_for)(void* user, int count, gatedconv_task task, void* context);

/* gatedconv_plan_run() on threads of the caller's: parallel_for(user, ...) is called zero or more times, with
 * a count from 2 to the number of threads, at most 64. NULL means the library's own threads. */
GATEDCONV_PLAN_API int gatedconv_plan_run_on(const gatedconv_plan* plan, const float* input,
                                             const int64_t size[4], const int64_t stride[4], float* output,
                                             int64_t output_floats, int threads,
                                             gatedconv_parallel_for parallel_for, void* user);

/* The value of a key in the file, NULL without one; valid until the plan is closed. Numbers are decimal.
 *
 * - "producer": name and version of the program that wrote the file
 * - "version": of the file
 * - "classes": names of the outputs, one in a line
 * - "mean", "std": for every channel, of pixels from 0 to 1: the network's input is (pixel - mean) / std */
GATEDCONV_PLAN_API const char* gatedconv_plan_metadata(const gatedconv_plan* plan, const char* key);

/* Writes a table of what runs for an input of this size, as snprintf does: returns the length without the
 * final zero, whether or not `room` bytes hold it. */
GATEDCONV_PLAN_API int64_t gatedconv_plan_describe(const gatedconv_plan* plan, const int64_t input[4],
                                                   int threads, char* text, int64_t room);

/* The instruction set in use: "portable", "avx2" or "avx512"; the environment's GATEDCONV_ISA limits it. */
GATEDCONV_PLAN_API const char* gatedconv_plan_isa(void);

/* Frees the memory that finished runs have left for the next ones; returns its bytes. */
GATEDCONV_PLAN_API int64_t gatedconv_plan_release(void);

#ifdef __cplusplus
}
#endif

#endif
