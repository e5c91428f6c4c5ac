"""The checkpoint loads bit-exactly, by every way in, or not at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.artefact import sha256_of_file
from pipeline.checkpoint.folder import load_checkpoint
from pipeline.checkpoint.skeleton import Skeleton
from pipeline.compress.request import CompressRequest
from pipeline.compress.run import compress_to_folder
from pipeline.errors import InputError, UsageError
from tests.support.families import FAMILIES, save_family
from tests.support.model_families import save_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("checkpoint"), "llama")


def request(source: Path) -> CompressRequest:
    return CompressRequest(
        str(source),
        keep_params=0.7,
        method="skipcat",
        windows=4,
        window_length=24,
        dtype="float16",
    )


def make(folder: Path, family: str) -> Path:
    source = save_family(folder / "source", family)
    compress_to_folder(request(source), folder / "small")
    return folder / "small"


def copy_of(checkpoint: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_bit_exactly_through_the_strict_loader(family: str, tmp_path: Path) -> None:
    folder = make(tmp_path, family)
    stored = load_file(folder / "model.safetensors")
    state = load_checkpoint(folder).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    # What is not stored is tied to something that is.
    assert {name for name in state if name not in stored} <= {"lm_head.weight"}


def test_loads_bit_exactly_where_skipcat_is_not_installed(checkpoint: Path, tmp_path: Path) -> None:
    script = (
        "import sys, torch\n"
        "from safetensors.torch import load_file\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained("
        f"{str(checkpoint)!r}, trust_remote_code=True)\n"
        "assert 'pipeline' not in sys.modules\n"
        "state = model.state_dict()\n"
        f"stored = load_file({str(checkpoint / 'model.safetensors')!r})\n"
        "assert all(torch.equal(state[n], t) for n, t in stored.items())\n"
        "assert model.dtype == torch.float16\n"
        f"model.save_pretrained({str(tmp_path / 'again')!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": "/bin"},
    )
    assert done.returncode == 0, done.stderr
    again = load_file(tmp_path / "again" / "model.safetensors")
    first = load_file(checkpoint / "model.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_config_keeps_the_base_type_and_names_method_ranks_and_stored_type(
    checkpoint: Path,
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    quantization = config["quantization_config"]
    entry = quantization["modules"]["model.layers.0.self_attn.k_proj"]
    assert config["model_type"] == "llama"
    assert config["dtype"] == "float16"
    assert quantization["quant_method"] == "skipcat"
    assert entry["owner"] == "model.layers.0.self_attn.q_proj"
    assert entry["rank"] > 0


def test_folder_holds_everything_the_contract_names(checkpoint: Path) -> None:
    names = {file.name for file in checkpoint.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "recipe.json",
        "report.json",
        "plan.json",
        "README.md",
        "modeling_quantized.py",
        "modeling_skipcat.py",
    }
    recipe = json.loads((checkpoint / "recipe.json").read_text())
    assert recipe["calibration"]["tokens"] == 4 * 24
    assert len(recipe["calibration"]["sha256"]) == 64


def test_a_missing_tensor_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_of(checkpoint, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.gate_proj.down.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="not those") as caught:
        load_checkpoint(folder)
    assert "gate_proj.down.weight" in caught.value.details["observed"]


def test_a_superfluous_tensor_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_of(checkpoint, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.extra.weight"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="not those"):
        load_checkpoint(folder)


def test_a_tensor_of_another_shape_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_of(checkpoint, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.gate_proj.down.weight"
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError):
        load_checkpoint(folder)


def test_truncated_weights_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_of(checkpoint, tmp_path / "broken")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="truncated"):
        load_checkpoint(folder)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Not a checkpoint"):
        load_checkpoint(tmp_path)


def test_an_existing_output_is_not_touched(checkpoint: Path) -> None:
    before = (checkpoint / "config.json").read_bytes()
    with pytest.raises(UsageError, match="exists"):
        compress_to_folder(request(checkpoint.parent / "source"), checkpoint)
    assert (checkpoint / "config.json").read_bytes() == before


@pytest.mark.parametrize("value", [10**6, -1, 0])
def test_a_permutation_that_is_none_is_refused_by_every_reader(value: int, tmp_path: Path) -> None:
    written = Path(__file__).parents[2] / "fixtures" / "written_before" / "checkpoint"
    copy = shutil.copytree(written, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".permutation"))
    tensors[name][tensors[name] == 1] = value
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    for read in (load_checkpoint, lambda folder: Skeleton.load(folder, torch.float32)):
        with pytest.raises(InputError, match="permutation"):
            read(copy)


@pytest.mark.parametrize(
    "entry",
    [5, {"rank": 10**9}, {"rank": True}, {"rank": -1}, {"form": "other"}, {"owner": "nobody"}],
)
def test_an_entry_that_contradicts_the_model_is_refused(entry: object, tmp_path: Path) -> None:
    written = Path(__file__).parents[2] / "fixtures" / "written_before" / "checkpoint"
    copy = shutil.copytree(written, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    name = next(name for name, fields in modules.items() if fields["owner"] is None)
    modules[name] = modules[name] | entry if isinstance(entry, dict) else entry
    (copy / "config.json").write_text(json.dumps(config))
    for read in (load_checkpoint, lambda folder: Skeleton.load(folder, torch.float32)):
        with pytest.raises(InputError):
            read(copy)


def test_a_class_that_looks_at_the_weights_of_its_layers_loads(tmp_path: Path) -> None:
    """NanoChat's initialises some by their name, also where a checkpoint has all of them."""
    source = save_model(tmp_path / "model", "nanochat")
    request = CompressRequest(str(source), 0.7, windows=8, window_length=16, method="skipcat")
    compress_to_folder(request, tmp_path / "small")
    model = load_checkpoint(tmp_path / "small")
    stored = load_file(tmp_path / "small" / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())


def test_other_weights_than_the_record_names_are_refused_and_older_records_name_none(
    checkpoint: Path, tmp_path: Path
) -> None:
    output = copy_of(checkpoint, tmp_path / "copy")
    weights, record = output / "model.safetensors", output / "report.json"
    assert json.loads(record.read_text())["weights"] == {
        weights.name: {
            "bytes": weights.stat().st_size,
            "sha256": sha256_of_file(checkpoint / weights.name),
        }
    }
    load_checkpoint(output)
    tensors = load_file(weights)
    changed = {"model.norm.weight": tensors["model.norm.weight"] * 1.5}
    save_file(tensors | changed, weights, {"format": "pt"})
    for load_folder in (load_checkpoint, partial(Skeleton.load, dtype=torch.float32)):
        with pytest.raises(InputError, match="not those that the checkpoint's record") as caught:
            load_folder(output)
        assert sha256_of_file(weights) in caught.value.details["observed"]
    written = json.loads(record.read_text())
    del written["weights"]
    record.write_text(json.dumps(written))
    load_checkpoint(output)
