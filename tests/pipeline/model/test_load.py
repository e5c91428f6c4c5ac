from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, T5Config, T5ForConditionalGeneration, dynamic_module_utils

from pipeline.errors import InputError
from pipeline.model import load
from pipeline.model.load import load_model
from tests.support.families import FAMILIES, save_family, tiny_model
from tests.support.tiny_decoder import byte_tokenizer

SPY_CODE = """
from pathlib import Path
Path({marker!r}).write_text("the model's code ran")
from transformers import LlamaConfig, LlamaForCausalLM

class SpyConfig(LlamaConfig):
    model_type = "spy"

class SpyForCausalLM(LlamaForCausalLM):
    config_class = SpyConfig
"""


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add_spy(folder: Path, model_type: str) -> Path:
    """Let the config name code that leaves a marker when it is run; return the marker."""
    marker = folder.parent / "marker"
    (folder / "modeling_spy.py").write_text(SPY_CODE.format(marker=str(marker)))
    auto_map = {
        "AutoConfig": "modeling_spy.SpyConfig",
        "AutoModelForCausalLM": "modeling_spy.SpyForCausalLM",
    }
    edit_config(folder, model_type=model_type, auto_map=auto_map)
    return marker


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_family(tmp_path / "model", "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_family_is_loaded_bit_for_bit(family: str, tmp_path: Path) -> None:
    loaded = load_model(str(save_family(tmp_path, family)))
    original = tiny_model(family).state_dict()
    assert not loaded.model.training
    assert loaded.model.state_dict().keys() == original.keys()
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, original[name]), name
    assert loaded.tokenizer("abc")["input_ids"] == byte_tokenizer()("abc")["input_ids"]


def test_the_published_type_is_remembered_though_weights_are_held_in_float32(
    tmp_path: Path,
) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.storage_dtype == torch.bfloat16
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("free_bytes", "held"), [(10**9, torch.float32), (2 * 144_000, torch.bfloat16)]
)
def test_weights_are_held_as_published_only_where_float32_has_no_room(
    free_bytes: int,
    held: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    published = tiny_model("llama").to(torch.bfloat16)
    published.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    # In float32 it takes 4 x 36,000 bytes, of which there must be twice as many.
    assert 4 * sum(p.numel() for p in published.parameters()) == 144_000
    monkeypatch.setattr(
        load.psutil, "virtual_memory", lambda: SimpleNamespace(available=free_bytes - 1)
    )
    loaded = load_model(str(tmp_path), dtype=None)
    assert {p.dtype for p in loaded.model.parameters()} == {held}
    assert loaded.storage_dtype == torch.bfloat16
    for name, tensor in published.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name].bfloat16(), tensor), name
    assert ("weights stay in their files" in capsys.readouterr().err) == (held != torch.float32)


def test_weights_are_streamed_when_asked_though_memory_has_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype=None, stream_weights=True)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert "weights stay in their files" in capsys.readouterr().err


@pytest.mark.parametrize(
    "lost", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]
)
def test_a_tensor_that_is_missing_is_named_and_not_made_up(folder: Path, lost: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors[lost]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InputError, match=rf"(?s)does not hold all weights.*{lost}"):
        load_model(str(folder))


def test_a_tensor_of_another_shape_is_refused(folder: Path) -> None:
    edit_config(folder, intermediate_size=48)
    with pytest.raises(InputError, match=str(folder)) as caught:
        load_model(str(folder))
    assert "gate_proj.weight ([64, 32] in the file, [48, 32] by" in caught.value.details["observed"]


def test_a_shard_that_is_missing_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    byte_tokenizer().save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[-1].unlink()
    with pytest.raises(InputError, match=shards[-1].name):
        load_model(str(tmp_path))


def test_a_gguf_that_ends_after_its_first_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(InputError, match="could not be loaded"):
        load_model(str(path))


def test_a_config_that_is_not_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        load_model(str(folder))


@pytest.mark.parametrize("method", ["skipcat", "gptq", "fp8"])
def test_a_model_that_is_compressed_already_is_refused(folder: Path, method: str) -> None:
    edit_config(folder, quantization_config={"quant_method": method, "modules": {}})
    with pytest.raises(InputError, match=rf"(?s)already.*quant_method {method}.*original weights"):
        load_model(str(folder))


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = T5Config(vocab_size=272, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="t5, an encoder-decoder"):
        load_model(str(tmp_path))


def test_a_hub_id_without_network_says_so() -> None:
    with pytest.raises(InputError, match=r"(?s)no-one/nothing.*network"):
        load_model("no-one/nothing")


def test_code_of_an_unknown_architecture_is_refused_and_not_run(folder: Path) -> None:
    marker = add_spy(folder, "spy")
    with pytest.raises(InputError, match="pass --trust-remote-code if you trust it"):
        load_model(str(folder))
    assert not marker.exists()


def test_code_beside_a_known_architecture_is_not_run(folder: Path) -> None:
    marker = add_spy(folder, "llama")
    assert type(load_model(str(folder)).model).__module__.startswith("transformers.")
    assert not marker.exists()


def test_code_runs_when_it_is_trusted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = add_spy(folder, "spy")
    loaded = load_model(str(folder), trust_remote_code=True)
    assert type(loaded.model).__name__ == "SpyForCausalLM"
    assert marker.exists()


def test_running_out_of_memory_is_not_blamed_on_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(AutoConfig, "from_pretrained", run_out)
    with pytest.raises(MemoryError):
        load_model(str(folder))
