#!/usr/bin/env bash
# Compiles the portable kernels for browsers and Node.js with Emscripten: build.sh FOLDER writes plan.mjs, which a page
# imports, and next to it library.mjs and library.wasm. One thread, SIMD of 128 bits, no file system.
set -euo pipefail
export NODE_PATH=${NODE_PATH:-/usr/share/nodejs}  # where Debian's Emscripten finds its modules, whichever Node.js runs
here=$(cd "$(dirname "$0")" && pwd)
csrc=$here/../../csrc/cpu
out=${1:?usage: build.sh FOLDER}
mkdir -p "$out"
functions=$(grep -o 'gatedconv_plan_[a-z_]*(' "$csrc/gatedconv_plan.h" | sort -u | sed 's/\(.*\)(/"_\1"/' | paste -sd,)
"${EMXX:-em++}" -std=c++20 -O3 -msimd128 -fwasm-exceptions -Wall -Wextra \
  "$csrc"/{bf16_x86,gatedconv_plan,plan,plan_bands,plan_decode,plan_file,plan_header,plan_portable,plan_schedule,plan_weights,worker_pool}.cpp \
  -sMODULARIZE -sEXPORT_ES6 -sENVIRONMENT=web,worker -sALLOW_MEMORY_GROWTH -sWASM_BIGINT -sFILESYSTEM=0 \
  -sEXPORTED_FUNCTIONS="[$functions,\"_malloc\",\"_free\"]" -sEXPORTED_RUNTIME_METHODS='["UTF8ToString","HEAPU8"]' \
  -o "$out/library.mjs"
cp "$here/plan.mjs" "$out"
