"""Files that are damaged, cut short, foreign or newer are refused in one line; whatever opens also runs."""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
import resource
import subprocess
import sys
import zlib

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.runtime.conftest import ROOT, X
from tests.runtime.test_images import png

# Maps may grow to this before a mutated plan is not run any more.
MOST_WORKSPACE = 1 << 25


def split(content):
    """A file's header and data."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header, data, *, checksum=True):
    """A file of a header and data; its checksum is made right again, so that what is behind it is reached."""
    header = json.loads(json.dumps(header))
    texts = header.get("__metadata__")
    if checksum and isinstance(texts, dict):
        said = sorted((k, v) for k, v in texts.items() if k != "checksum")
        texts["checksum"] = (
            f"crc32:{zlib.crc32(b''.join(f'{k}{chr(0)}{v}{chr(0)}'.encode() for k, v in said) + data):08x}"
        )
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def refuse(rt, content, words):
    with pytest.raises(rt.PlanError, match=words) as caught:
        rt.load(content)
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_truncated_anywhere_is_refused(rt, plan_bytes):
    length = 8 + int.from_bytes(plan_bytes[:8], "little")
    for size in [*range(0, length, 7), length, length + 9, len(plan_bytes) // 2, len(plan_bytes) - 1]:
        refuse(rt, plan_bytes[:size], "it is no plan|cut short")
    refuse(rt, plan_bytes + b"\0", "goes on after its end")


def test_a_flipped_bit_anywhere_is_noticed(rt, plan_bytes):
    draw = random.Random(0)
    header = 8 + int.from_bytes(plan_bytes[:8], "little")
    for i in range(400):
        at = draw.randrange(header) if i % 2 else draw.randrange(header, len(plan_bytes))
        damaged = bytearray(plan_bytes)
        damaged[at] ^= 1 << draw.randrange(8)
        if at >= header:
            refuse(rt, bytes(damaged), "damaged")
            continue
        try:  # blanks between the parts of a header may change and mean the same
            net = rt.load(bytes(damaged))
        except rt.PlanError:
            continue
        assert net.classes[0] == "cat" and net.input_size == (3, 3, 16, 16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h["__metadata__"].update(format="gatedconv"), "it is no plan"),
        (lambda h: h.pop("__metadata__"), "it is no plan"),
        (lambda h: h["__metadata__"].update(version="-1"), "damaged"),
        (lambda h: h["__metadata__"].update(version="one"), "damaged"),
        (lambda h: h["__metadata__"].update(input="3 4 16 16"), "another number of channels"),
        (lambda h: h["__metadata__"].update(input="3 3 16"), "damaged"),
        (lambda h: h["__metadata__"].update(input="3 3 16 9999999999999999999999"), "damaged"),
        (lambda h: h["__metadata__"].update(input="3 3 16 4611686018427387904"), "too large"),
        (lambda h: h["__metadata__"].update(rank="3"), "damaged"),
        (lambda h: h["__metadata__"].pop("rank"), "damaged"),
        (lambda h: h["__metadata__"].update(classes=3), "damaged"),
        (lambda h: h.pop("weights"), "it is no plan"),
        (lambda h: h.update(more=h["weights"]), "it is no plan"),
        (lambda h: h["weights"].update(dtype="I32"), "damaged"),
        (lambda h: h["weights"].update(shape=[2, 3]), "damaged"),
        (lambda h: h["weights"].update(extra="1"), "damaged"),
        (lambda h: h["weights"].update(shape=[1 << 61], data_offsets=[0, 1 << 63]), "damaged"),
        (lambda h: h["program"].update(data_offsets=[8, 16]), "damaged"),
        (lambda h: h["program"].update(shape=[1 << 50], data_offsets=[0, 1 << 53]), "damaged"),
    ],
)
def test_headers_that_are_wrong_are_refused(rt, plan_bytes, change, words):
    header, data = split(plan_bytes)
    change(header)
    refuse(rt, join(header, data), words)


def test_a_newer_file_is_refused_in_one_line(rt, plan_bytes):
    header, data = split(plan_bytes)
    ours = rt.file_version()
    assert header["__metadata__"]["version"] == str(ours) == str(np.frombuffer(data[:8], np.int64)[0])
    newer = {**header, "__metadata__": {**header["__metadata__"], "version": str(ours + 1)}}
    line = f"it is a file of version {ours + 1}, and this library reads version {ours}: update gatedconv-runtime"
    refuse(rt, join(newer, data), f"^{line}$")
    program = (ours + 1).to_bytes(8, "little") + data[8:]  # of which the header says nothing
    refuse(rt, join(header, program), "the program is of another version")


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}}",
        '{"a":1}',
        '{"__metadata__":{"a":"b"',
        '{"__metadata__":{"a":"\\ud800"}}',
        '{"__metadata__":{"a":"\\udc00"}}',
        '{"__metadata__":{"a":"\\u0000"}}',
        '{"__metadata__":{"a":"\\x"}}',
        '{"__metadata__":{"a":"b","a":"b"}}',
        '{"weights":{"shape":[01]}}',
        '{"weights":{"shape":[-1]}}',
        '{"weights":{"shape":[99999999999999999999]}}',
        "{" * 1000,
    ],
)
def test_headers_that_are_no_json_of_a_plan_are_refused(rt, text):
    refuse(rt, len(text).to_bytes(8, "little") + text.encode(), "no plan|damaged")


def test_foreign_files_are_refused(rt, tmp_path):
    refuse(rt, safetensors.torch.save({"program": torch.arange(3), "weights": torch.ones(2)}), "it is no plan")
    refuse(rt, b"", "it is no plan")
    refuse(rt, b"\x89PNG\r\n\x1a\n" + bytes(100), "it is no plan")
    with pytest.raises(rt.PlanError, match=r"gone\.plan: No such file"):
        rt.load(tmp_path / "gone.plan")
    with pytest.raises(rt.PlanError, match="it is no file"):
        rt.load(tmp_path)
    with pytest.raises(rt.PlanError, match="is no path"):
        rt.load("a\0b")


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("classes", "a\nb", "the file's classes are damaged: 2 names"),
        ("mean", "0.5 0.5", "the file's mean is damaged: '0.5 0.5'"),
        ("std", "1 1 one", "the file's std is damaged: '1 1 one'"),
    ],
)
def test_texts_that_do_not_fit_the_network_are_refused_where_they_are_read(
    rt, plan_bytes, tmp_path, capsys, key, text, words
):
    header, data = split(plan_bytes)
    header["__metadata__"][key] = text
    path = tmp_path / "net.plan"
    path.write_bytes(join(header, data))
    with pytest.raises(rt.PlanError, match=words):
        getattr(rt.load(path), key)
    (tmp_path / "image.png").write_bytes(png(np.zeros((16, 16, 3), np.uint8), (0,), 2))
    main = importlib.import_module("gatedconv_runtime.__main__").main
    assert main([str(path), str(tmp_path / "image.png")]) == 2
    assert capsys.readouterr().err == f"gatedconv_runtime: {words}\n"


def mutate(program, draw):
    """One or two numbers of a program replaced by small, large, neighboring or copied ones."""
    for _ in range(draw.choice((1, 1, 2))):
        at = draw.randrange(len(program))
        program[at] = draw.choice(
            (
                draw.randrange(-2, 40),
                program[draw.randrange(len(program))],
                program[at] + draw.choice((-16, -1, 1, 16)),
                1 << draw.randrange(63),
                -(1 << draw.randrange(63)),
            )
        )


def test_mutated_programs_are_refused_or_run(rt, plan_bytes):
    header, data = split(plan_bytes)
    end = header["program"]["data_offsets"][1]
    original, weights = np.frombuffer(data[:end], np.int64), data[end:]
    draw, opened, ran = random.Random(0), 0, 0
    for _ in range(1500):
        program = original.copy()
        mutate(program, draw)
        try:
            net = rt.load(join(header, program.tobytes() + weights))
            opened += 1
            if net.workspace() <= MOST_WORKSPACE and np.prod(net.output_size(net.input_size)) <= MOST_WORKSPACE:
                net(X.numpy(), threads=1)
                ran += 1
        except rt.PlanError:
            pass
    assert opened > 100 and ran > 100


def test_what_the_fuzzer_checks_from_python_holds_for_random_bytes(rt):
    assert rt  # imports the package before the script does
    path = ROOT / "runtime/fuzz/fuzz_python.py"
    spec = importlib.util.spec_from_file_location("fuzz_python", path)
    fuzzer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzzer)
    draw = random.Random(0)
    answers = sum(fuzzer.check(draw.randbytes(draw.randrange(1, 80))) for _ in range(1500))
    assert answers > 50


LIMITED = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import numpy as np, gatedconv_runtime as rt
net = rt.load(sys.argv[2], threads=1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), used + (64 << 20)))
x = np.broadcast_to(np.zeros(1, np.float32), (1, 3, 2048, 2048))
try:
    net(x)
except rt.PlanError as error:
    print(error)
try:
    rt.load(open(sys.argv[2], "rb").read())
    print("loads")
except rt.PlanError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_lack_of_memory_is_an_error(package, plan_bytes, tmp_path):
    path = tmp_path / "net.plan"
    path.write_bytes(plan_bytes)
    done = subprocess.run([sys.executable, "-c", LIMITED, package, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["no memory", "loads"]


@pytest.mark.slow
def test_ten_thousand_loads_leave_nothing_behind(rt, plan_bytes):
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    for _ in range(500):
        rt.load(plan_bytes)(X.numpy(), threads=1)
    before = peak()
    for i in range(10_000):
        net = rt.load(plan_bytes)
        if i % 100 == 0:
            net(X.numpy(), threads=1)
    assert peak() - before < 2048  # KiB; one plan that stays each time would be 300 MiB
