#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
