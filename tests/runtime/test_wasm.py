"""The library in WebAssembly: the bits of the portable kernels, the same errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import gatedconv
from gatedconv import _build
from tests.runtime.conftest import ROOT, X
from tests.runtime.test_native import require, run
from tests.runtime.test_plans import NETS

BUILD = ROOT / "runtime/wasm/build.sh"
# Reads net.plan and the tensors of numbers x-0, x-1, ... of the given sizes, writes y-0, y-1, ...
SCRIPT = """
import { readFileSync, writeFileSync } from "node:fs";
import { Plan, PlanError } from "./plan.mjs";
const bytes = new Uint8Array(readFileSync("net.plan"));
const said = {};
for (const [name, range] of [["cut", [0, -1]], ["foreign", [8]], ["empty", [0, 0]]]) {
  try { new Plan(bytes.slice(...range)); } catch (error) { said[name] = error instanceof PlanError && error.message; }
}
const net = new Plan(bytes);
said.size = net.inputSize, said.classes = net.metadata("classes"), said.none = net.metadata("no such");
said.outputs = JSON.parse(process.argv[2]).map((size, i) => {
  const x = new Float32Array(new Uint8Array(readFileSync(`x-${i}`)).buffer);
  writeFileSync(`y-${i}`, net.run(x, size));
  return net.outputSize(size);
});
for (const [name, x, size] of [["channels", 12, [1, 2, 2, 3]], ["short", 3, undefined], ["rank", 3, [3]]]) {
  try { net.run(new Float32Array(x), size); } catch (error) { said[name] = error.message; }
}
try { net.run([1, 2, 3]); } catch (error) { said.array = error instanceof PlanError ? 0 : error.message; }
for (let i = 0; i < 2000; ++i) new Plan(bytes).close();
net.close();
try { net.outputSize(); } catch (error) { said.closed = error.message; }
console.log(JSON.stringify(said));
"""


def test_the_build_lists_the_portable_sources():
    listed = BUILD.read_text().split('"$csrc"/{')[1].split("}")[0].split(",")
    assert set(listed) == {name for name in _build.PLAN_SOURCES if not name.endswith(tuple(_build.ISA_FLAGS))}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library and a script that uses it."""
    require("em++", "node")
    folder = tmp_path_factory.mktemp("wasm")
    run(BUILD, folder)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 500_000
    (folder / "script.mjs").write_text(SCRIPT)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NETS)
def test_outputs_in_webassembly_are_those_of_the_portable_kernels(rt, built, name, monkeypatch):
    monkeypatch.setenv("GATEDCONV_ISA", "portable")
    model = NETS[name]()
    classes = None if name == "map" else tuple(f"class {i}" for i in range(model(X).shape[1]))
    gatedconv.export(model, built / "net.plan", X, format="plan", classes=classes)
    net = rt.load(built / "net.plan", threads=1)
    inputs = [X.numpy(), X[:1].numpy(), np.random.default_rng(0).standard_normal((2, 3, 20, 24), np.float32)]
    for i, x in enumerate(inputs):
        (built / f"x-{i}").write_bytes(x.tobytes())
    said = json.loads(run("node", "script.mjs", json.dumps([x.shape for x in inputs]), cwd=built).splitlines()[-1])
    for i, x in enumerate(inputs):
        expected = net(x)
        assert said["outputs"][i] == list(expected.shape)
        found = np.frombuffer((built / f"y-{i}").read_bytes(), np.float32).reshape(expected.shape)
        np.testing.assert_array_equal(found, expected)
    assert said["cut"] == "the file is cut short" and said["foreign"] == said["empty"] == "it is no plan"
    assert said["size"] == list(net.input_size) and said["none"] is None
    assert said["classes"] == (None if classes is None else "\n".join(classes))
    assert "must have 3 channels" in said["channels"]
    assert said["short"] == "the input must be a Float32Array of 2304 numbers"
    assert said["array"].startswith("the input must be") and said["rank"] == "a size has four numbers: N, C, H, W"
    assert said["closed"] == "the plan is closed"
