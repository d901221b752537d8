#!/usr/bin/env bash
# Fuzzes the reader and the interpreter of plans for SECONDS: run.sh [SECONDS [libFuzzer's options...]]. Needs clang.
# The corpus is kept in a copy; `run.sh 0 -merge=1 runtime/fuzz/corpus NEW` takes over what reaches new code.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
csrc=$here/../../csrc
build=${BUILD:-$here/../../build/fuzz}
seconds=${1:-60}
shift || true
mkdir -p "$build/corpus"
flags=(-std=c++20 -O1 -g -fno-sanitize-recover=all -DFUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION "-I$csrc" "-I$csrc/cpu")
sanitizers=fuzzer-no-link,address,undefined
# Kernels are in headers: any change of a source, or of the flags here, compiles all again.
newer=$(find "$csrc" "$here"/*.cpp "$here/run.sh" -type f -newer "$build/fuzz_plan" -print -quit 2>/dev/null || echo all)
objects=()
for source in "$here/fuzz_plan.cpp" "$csrc"/cpu/{bf16_x86,gatedconv_plan,plan,plan_avx2,plan_avx512,plan_bands,plan_decode,plan_file,plan_header,plan_portable,plan_schedule,plan_weights,worker_pool}.cpp; do
  options=("-fsanitize=$sanitizers")
  # Kernels have few branches for the input to find, and take minutes to compile with all of it.
  case $source in
    *_portable.cpp) options=(-fsanitize=address) ;;
    *_avx2.cpp) options=(-fsanitize=address -mavx2 -mfma) ;;
    *_avx512.cpp) options=(-fsanitize=address -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma) ;;
  esac
  object=$build/$(basename "$source" .cpp).o
  objects+=("$object")
  [ -e "$object" ] && [ -z "$newer" ] || "${CLANG:-clang++}" "${flags[@]}" "${options[@]}" -c "$source" -o "$object"
done
"${CLANG:-clang++}" -fsanitize=fuzzer,address,undefined "${objects[@]}" -o "$build/fuzz_plan" -pthread
if [ "$seconds" = 0 ]; then
  exec "$build/fuzz_plan" "$@"
fi
exec "$build/fuzz_plan" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=2048 -max_len=32768 \
  -artifact_prefix="$build/" "$@" "$build/corpus" "$here/corpus"
