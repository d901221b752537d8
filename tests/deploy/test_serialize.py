"""save and load: every stage of a model, and files that are not what they should be."""

from __future__ import annotations

import errno
import json
import os
import struct

import pytest
import torch

import gatedconv
from tests.oracle import random_masks, randomize_statistics
from tests.tolerances import assert_close

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def stages():
    torch.manual_seed(0)
    model = gatedconv.models.resnet20(
        gate="both", position="middle", shortcut="A", num_classes=7, input_size=(3, 16, 16)
    )
    randomize_statistics(model, 0)
    model.eval()
    masks = random_masks({n: g.num_gates for n, g in gatedconv.gates(model).items()}, "odd", 3)
    frozen = gatedconv.freeze(model, masks=masks)
    dense = gatedconv.models.resnet20().eval()
    return {"dense": dense, "gated": model, "frozen": frozen, "compact": gatedconv.compact(frozen, X)}


@pytest.mark.parametrize("stage", ["dense", "gated", "frozen", "compact"])
def test_a_loaded_model_computes_the_same_bits(stage, tmp_path):
    model = stages()[stage]
    gatedconv.save(model, tmp_path / "model.safetensors")
    loaded = gatedconv.load(tmp_path / "model.safetensors")
    assert torch.equal(loaded(X), model(X)) and not loaded.training
    assert list(loaded.state_dict()) == list(model.state_dict())
    if stage in ("frozen", "compact"):
        assert loaded.consensus.masks.keys() == model.consensus.masks.keys()
        assert all(torch.equal(loaded.consensus.masks[n], m) for n, m in model.consensus.masks.items())


def test_doubles_stay_doubles(tmp_path):
    model = stages()["compact"].double()
    gatedconv.save(model, tmp_path / "m")
    assert torch.equal(gatedconv.load(tmp_path / "m")(X.double()), model(X.double()))


def test_nothing_in_the_file_is_a_pickle(tmp_path):
    gatedconv.save(stages()["compact"], tmp_path / "m")
    data = (tmp_path / "m").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])  # the whole header is JSON, and tensors are what follows
    assert header["__metadata__"]["gatedconv"].startswith("{")


def edit_header(path, edit):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_damaged_truncated_foreign_and_newer_files(tmp_path):
    path = tmp_path / "m.safetensors"
    gatedconv.save(stages()["frozen"], path)
    good = path.read_bytes()

    def description(change):
        def edit(header):
            inner = json.loads(header["__metadata__"]["gatedconv"])
            change(inner)
            header["__metadata__"]["gatedconv"] = json.dumps(inner)

        return edit

    def refuses(match, error=ValueError):
        with pytest.raises(error, match=match) as caught:
            gatedconv.load(path)
        assert "m.safetensors" in str(caught.value)
        path.write_bytes(good)

    path.write_bytes(good[:-100])
    refuses("not a complete safetensors file")
    path.write_bytes(b"PK\x03\x04 something else")
    refuses("not a complete safetensors file")
    path.write_bytes(b"")
    refuses("not a complete safetensors file")
    edit_header(path, lambda header: header.pop("__metadata__"))
    refuses("gatedconv did not write it")
    edit_header(path, description(lambda d: d.update(version=99)))
    refuses("format version 99")
    edit_header(path, description(lambda d: d.update(version="2")))
    refuses("format version '2'")
    edit_header(path, description(lambda d: d["model"].update(name="resnet999")))
    refuses("unknown model 'resnet999'")
    edit_header(path, description(lambda d: d.pop("consensus")))
    refuses("damaged")
    edit_header(path, description(lambda d: d["model"].update(num_classes=8)))
    refuses("do not fit")
    edit_header(path, description(lambda d: d["model"].update(num_classes=400_000)))
    refuses("400000 is larger than every tensor")
    edit_header(path, description(lambda d: d["model"].update(input_size=[3, 60_000, 60_000])))
    refuses("numbers")
    edit_header(path, lambda header: header["__metadata__"].update(gatedconv="{"))
    refuses("damaged")
    path.unlink()
    refuses("no such file", FileNotFoundError)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    gatedconv.save(stages()["dense"], path)
    good = path.read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        gatedconv.save(stages()["compact"], path)
    assert path.read_bytes() == good and os.listdir(tmp_path) == ["m.safetensors"]


def test_mixed_dtypes_and_moved_masks_survive(tmp_path):
    models = stages()
    frozen, gated = models["frozen"], models["gated"]
    gated.fc.double()
    gatedconv.save(gated, tmp_path / "gated")
    kinds = {name: value.dtype for name, value in gatedconv.load(tmp_path / "gated").state_dict().items()}
    assert kinds == {name: value.dtype for name, value in gated.state_dict().items()}
    other = gatedconv.freeze(stages()["gated"], masks={n: ~m for n, m in frozen.consensus.masks.items()})
    frozen.load_state_dict(other.state_dict())
    for model in (frozen, gatedconv.compact(frozen, X)):
        gatedconv.save(model, tmp_path / "moved")
        assert torch.equal(gatedconv.load(tmp_path / "moved")(X), model(X))


def test_a_compact_network_that_never_had_gates(tmp_path):
    small = gatedconv.compact(gatedconv.models.resnet20().eval(), X)
    gatedconv.save(small, tmp_path / "m")
    loaded = gatedconv.load(tmp_path / "m")
    assert type(loaded) is gatedconv.models.ResNet
    assert torch.equal(loaded(X), small(X))


@pytest.mark.parametrize("position", ["after", "middle", "before"])
@pytest.mark.parametrize("gate", ["layer", "channel", "both"])
def test_gate_model_on_a_network_of_ours(gate, position, tmp_path):
    torch.manual_seed(0)
    model = gatedconv.models.ResNet(8, input_size=(3, 16, 16)).eval()
    gated = gatedconv.gate_model(model, gate, position=position, example_input=X)
    masks = random_masks({name: g.num_gates for name, g in gatedconv.gates(gated).items()}, "odd", 1)
    frozen = gatedconv.freeze(gated, masks=masks)
    small = gatedconv.compact(frozen, X)
    assert gatedconv.count_macs(small, X) < gatedconv.count_macs(model, X)
    assert_close(small(X), frozen(X))
    for stage in (gated, frozen, small):
        gatedconv.save(stage, tmp_path / "m")
        assert_close(gatedconv.load(tmp_path / "m")(X), stage(X))


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    changed = stages()["dense"]
    changed.fc = torch.nn.Linear(64, 5)
    for model in (changed, gatedconv.models.ResNet(8), torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="save: "):
            gatedconv.save(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_saved_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    gatedconv.save(stages()["dense"], tmp_path / "m")
    assert (tmp_path / "m").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_path_is_a_path():
    for call in (lambda: gatedconv.load(None), lambda: gatedconv.save(stages()["dense"], None)):
        with pytest.raises(TypeError, match="(load|save): path must be a str or os.PathLike, got NoneType"):
            call()


def test_what_is_loaded_in_inference_mode_can_be_trained(tmp_path):
    model = gatedconv.models.resnet20(gate="layer", input_size=(3, 8, 8))
    gatedconv.save(model, tmp_path / "a.safetensors")
    with torch.inference_mode():
        loaded = gatedconv.load(tmp_path / "a.safetensors")
    loaded.train()(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters() if p.dim() > 1)


def test_what_is_no_module_is_refused(tmp_path):
    for wrong in (None, {}, gatedconv.models.resnet20):
        with pytest.raises(TypeError, match="save: the model must be a torch.nn.Module, got"):
            gatedconv.save(wrong, tmp_path / "a.safetensors")
    with pytest.raises(TypeError, match="load: into must be a torch.nn.Module, got"):
        gatedconv.load(tmp_path / "a.safetensors", into=gatedconv.models.resnet20)
