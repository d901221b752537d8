"""Models on the Hub, without a network: a local folder, a stand-in for the service, the extra missing."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

import gatedconv
from tests.convert.networks import IMAGES, network

hub_mixin = pytest.importorskip("huggingface_hub.hub_mixin")


def small():
    gated = gatedconv.gate_model(network("residual"), "channel", example_input=IMAGES)
    masks = {name: torch.arange(gate.num_gates) % 2 == 0 for name, gate in gatedconv.gates(gated).items()}
    return gatedconv.compact(gatedconv.freeze(gated, masks=masks), IMAGES).eval()


def test_a_folder_is_written_and_read(tmp_path):
    model = small()
    gatedconv.HubModel(model).save_pretrained(tmp_path)
    loaded = gatedconv.HubModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(IMAGES), model(IMAGES)) and not loaded.training
    assert sorted(p.suffix for p in tmp_path.iterdir() if "model" in p.name) == [".safetensors"]
    assert torch.equal(gatedconv.load(tmp_path / "model.safetensors")(IMAGES), model(IMAGES))


def test_the_card_says_what_was_measured_and_how_to_run_it(tmp_path):
    model = small()
    outputs = model(IMAGES).shape[1]
    summary = {
        "dense": {"top1": 93.5, "macs": 41_000_000, "params": 272_000, "latency_ms": {"1": 3.1}},
        "frozen": {"top1": 92.25, "macs": 20_500_000, "params": 150_000, "engine_latency_ms": {"1": 0.4}},
        "agreement": 0.999,
    }
    hub = gatedconv.HubModel(model).describe(
        summary=summary,
        license="apache-2.0",
        classes=[f"class {i}" for i in range(outputs)],
        mean=(0.5, 0.4, 0.3),
        std=(0.25, 0.25, 0.25),
        example_input=IMAGES,
    )
    hub.save_pretrained(tmp_path, model_card_kwargs={"repo_id": "someone/half"})
    card = (tmp_path / "README.md").read_text()
    assert "license: apache-2.0" in card and "library_name: gatedconv" in card
    assert "| top-1 (%) | 93.50 | 92.25 |" in card and "| MACs (M) | 41.00 | 20.50 |" in card
    assert "| latency, batch 1 (ms) | 3.100 | - |" in card and "| latency, batch 1, engine (ms) | - | 0.400 |" in card
    assert "99.90%" in card and "mean (0.5000, 0.4000, 0.3000)" in card and f"{outputs} classes: class 0" in card
    assert (
        'HubModel.from_pretrained("someone/half")' in card and 'hf_hub_download("someone/half", "model.plan")' in card
    )
    assert (tmp_path / "model.plan").read_bytes()[8:9] == b"{"
    bare = gatedconv.HubModel(model).generate_model_card().text
    assert "Measured" not in bare and "gatedconv_runtime" not in bare and "from_pretrained" in bare


def test_what_is_pushed_is_what_comes_back(tmp_path, monkeypatch):
    remote, calls = tmp_path / "remote", []

    class Service:
        def __init__(self, token=None):
            calls.append(("login", token))

        def create_repo(self, repo_id, private=None, exist_ok=False):
            calls.append(("create", repo_id, private))
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id, folder_path, commit_message, **other):
            shutil.copytree(folder_path, remote / repo_id)
            calls.append(("upload", repo_id, commit_message))
            return "url"

    def download(repo_id, filename, revision=None, **other):
        calls.append(("download", repo_id, filename, revision))
        return str(remote / repo_id / filename)

    monkeypatch.setattr(hub_mixin, "HfApi", Service)
    for module in ("huggingface_hub.hub_mixin", "gatedconv.deploy.hub"):
        monkeypatch.setattr(f"{module}.hf_hub_download", download)
    model = small()
    gatedconv.HubModel(model).push_to_hub("someone/half", private=True, token="secret", commit_message="half of it")
    assert calls == [("login", "secret"), ("create", "someone/half", True), ("upload", "someone/half", "half of it")]
    assert not [p for p in remote.rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".py")]
    loaded = gatedconv.HubModel.from_pretrained("someone/half", revision="v1").model
    assert ("download", "someone/half", "model.safetensors", "v1") in calls
    assert torch.equal(loaded(IMAGES), model(IMAGES))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no model.safetensors"):
        gatedconv.HubModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        gatedconv.HubModel.from_pretrained(tmp_path)


def test_without_the_extra_the_error_names_what_to_install():
    program = (
        "import sys\n"
        "sys.modules['huggingface_hub'] = None\n"
        "import gatedconv\n"
        "try:\n"
        "    gatedconv.HubModel\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'gatedconv[hub]'" in done.stdout
