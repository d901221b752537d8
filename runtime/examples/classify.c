/* Prints the largest output of a plan for an image of float32 numbers (C, H, W): classify NET.plan IMAGE.f32
 */
#include <gatedconv_plan.h>
#include <stdio.h>
#include <stdlib.h>

static int fail(const char* why) {
  fprintf(stderr, "classify: %s\n", why);
  return 1;
}

int main(int argc, char** argv) {
  if (argc != 3) return fail("expected NET.plan IMAGE.f32");
  gatedconv_plan* plan = gatedconv_plan_open(argv[1]);
  if (!plan) return fail(gatedconv_plan_error());

  int64_t in[4], out[4];
  gatedconv_plan_input_size(plan, in);
  in[0] = 1; /* one image, whatever batch the plan was made for */
  if (gatedconv_plan_output_size(plan, in, out) < 0) return fail(gatedconv_plan_error());
  const size_t floats = (size_t)(in[1] * in[2] * in[3]), outputs = (size_t)(out[1] * out[2] * out[3]);
  float* image = malloc(floats * sizeof(float));
  float* scores = malloc(outputs * sizeof(float));
  FILE* file = fopen(argv[2], "rb");
  if (!image || !scores || !file || fread(image, sizeof(float), floats, file) != floats)
    return fail("the image cannot be read");
  fclose(file);

  if (gatedconv_plan_run(plan, image, in, NULL, scores, (int64_t)outputs, 1))
    return fail(gatedconv_plan_error());
  size_t best = 0;
  for (size_t i = 1; i < outputs; ++i)
    if (scores[i] > scores[best]) best = i;
  printf("%zu %.9g\n", best, scores[best]);
  free(image), free(scores);
  gatedconv_plan_close(plan);
  return 0;
}
