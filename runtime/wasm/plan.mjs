// Runs a network that `gatedconv export --format plan` has written, in a browser or in Node.js:
//
//   import { Plan } from "./plan.mjs";
//   const net = new Plan(new Uint8Array(await (await fetch("net.plan")).arrayBuffer()));
//   const y = net.run(x); // Float32Arrays of (N, C, H, W) and of net.outputSize()
import load from "./library.mjs";

const url = new URL("library.wasm", import.meta.url);
const wasmBinary =
  url.protocol === "file:" ? await (await import("node:fs/promises")).readFile(url) : await (await fetch(url)).arrayBuffer();
const lib = await load({ wasmBinary });

export class PlanError extends Error {}

/** A network. `close` frees it: garbage collection does not reach the library's memory. */
export class Plan {
  #handle;

  /** Throws PlanError for bytes (Uint8Array) that are no plan, damaged, or newer than this library. */
  constructor(bytes) {
    this.#handle = withBytes(bytes, (at) => lib._gatedconv_plan_open_memory(at, bytes.length));
    if (!this.#handle) throw lastError();
    /** [N, C, H, W] that the plan was made for. C is fixed. */
    this.inputSize = withSizes([[0, 0, 0, 0]], (size) => {
      lib._gatedconv_plan_input_size(this.#handle, size);
      return readSize(size);
    });
  }

  /** The output's size for an input of `size` [N, C, H, W]: [N, C] or [N, C, H, W]. */
  outputSize(size = this.inputSize) {
    return withSizes([size, [0, 0, 0, 0]], (input, output) => {
      const rank = lib._gatedconv_plan_output_size(this.#open, input, output);
      if (rank < 0) throw lastError();
      return readSize(output).slice(0, rank);
    });
  }

  /** Runs the network on a Float32Array of `size` [N, C, H, W], contiguous; returns a new one of `outputSize(size)`. */
  run(x, size = this.inputSize) {
    const floats = product(size), outputs = product(this.outputSize(size));
    if (!(x instanceof Float32Array) || x.length !== floats)
      throw new TypeError(`the input must be a Float32Array of ${floats} numbers`);
    const bytes = new Uint8Array(x.buffer, x.byteOffset, x.byteLength);
    return withSizes([size], (input) => withBytes(bytes, (from) => withBytes(new Uint8Array(4 * outputs), (to) => {
      if (lib._gatedconv_plan_run(this.#open, from, input, 0, to, BigInt(outputs), 1)) throw lastError();
      return new Float32Array(lib.HEAPU8.buffer, to, outputs).slice();
    })));
  }

  /** A text that the file carries ("classes", "mean", "std", "producer"), or null: see gatedconv_plan.h. */
  metadata(key) {
    const bytes = new TextEncoder().encode(key + "\0");
    const found = withBytes(bytes, (at) => lib._gatedconv_plan_metadata(this.#open, at));
    return found ? lib.UTF8ToString(found) : null;
  }

  /** Frees the network's memory; it cannot be used any more. */
  close() {
    lib._gatedconv_plan_close(this.#handle);
    this.#handle = 0;
  }

  get #open() {
    if (!this.#handle) throw new PlanError("the plan is closed");
    return this.#handle;
  }
}

function lastError() {
  return new PlanError(lib.UTF8ToString(lib._gatedconv_plan_error()));
}

function product(size) {
  return size.reduce((a, b) => a * b, 1);
}

/** Calls use(address) while the bytes are in the library's memory. */
function withBytes(bytes, use) {
  const at = lib._malloc(Math.max(bytes.length, 1));
  if (!at) throw new PlanError("no memory");
  try {
    lib.HEAPU8.set(bytes, at);
    return use(at);
  } finally {
    lib._free(at);
  }
}

/** Calls use(...addresses) while sizes of four numbers each are in the library's memory. */
function withSizes(sizes, use) {
  const numbers = BigInt64Array.from(sizes.flat(), BigInt);
  if (numbers.length !== 4 * sizes.length) throw new TypeError("a size has four numbers: N, C, H, W");
  return withBytes(new Uint8Array(numbers.buffer), (at) => use(...sizes.map((_, i) => at + 32 * i)));
}

function readSize(at) {
  return Array.from(new BigInt64Array(lib.HEAPU8.buffer, at, 4), Number);
}
