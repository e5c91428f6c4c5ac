"""Every verb looks at a model's folder alike, and finds the same in it as transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.checkpoint.folder import load_checkpoint
from pipeline.checkpoint.skeleton import Skeleton
from pipeline.errors import InputError
from pipeline.model.load import load_model
from tests.support.families import save_family, tiny_model
from tests.support.tiny_decoder import byte_tokenizer

TOKENS = torch.arange(20)[None]
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def by_skeleton(folder: Path) -> Any:
    return Skeleton.load(folder, torch.float32)


# What stands behind compress, inspect, evaluate and validate; run, serve and export-dense; export.
LOADERS: dict[str, Callable[[Path], Any]] = {
    "model": lambda folder: load_model(str(folder)).model,
    "checkpoint": load_checkpoint,
    "skeleton": by_skeleton,
}
every_loader = pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_family(tmp_path / "model", "llama")


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def add(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path, {"format": "pt"})


def matrix(loaded: Any, name: str) -> torch.Tensor:
    """A matrix as it is used, of a model or of a skeleton."""
    if isinstance(loaded, Skeleton):
        return loaded.matrices[name].read()
    weight: torch.Tensor = loaded.get_parameter(name)
    return weight


@every_loader
def test_files_beside_the_models_own_are_not_read_but_named(
    load: Callable[[Path], Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = load_file(folder / "model.safetensors")
    wrong = {name: tensor + 1 for name, tensor in right.items()}
    save_file(wrong, folder / "zz.safetensors", {"format": "pt"})
    save_file({"tok_embeddings.weight": torch.ones(2)}, folder / "consolidated.safetensors")
    assert torch.equal(matrix(load(folder), HEAD), right[HEAD])
    assert "consolidated.safetensors, zz.safetensors" in capsys.readouterr().err


@every_loader
def test_shards_are_those_of_the_index_and_one_whole_file_goes_before_them(
    load: Callable[[Path], Any], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    byte_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(matrix(load(tmp_path), HEAD), model.lm_head.weight)
    other = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    save_file(other, tmp_path / "model.safetensors", {"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight
    assert torch.equal(matrix(load(tmp_path), HEAD), theirs)


@every_loader
def test_a_head_of_its_own_is_used_though_the_config_says_tied(
    load: Callable[[Path], Any], folder: Path
) -> None:
    edit(folder, tie_word_embeddings=True)
    stored = load_file(folder / "model.safetensors")
    loaded = load(folder)
    assert torch.equal(matrix(loaded, HEAD), stored[HEAD])
    assert torch.equal(matrix(loaded, TABLE), stored[TABLE])
    config = (loaded.model if isinstance(loaded, Skeleton) else loaded).config
    assert config.tie_word_embeddings is False


@every_loader
@pytest.mark.parametrize("kept", [HEAD, TABLE])
def test_tied_weights_may_be_stored_under_either_name(
    load: Callable[[Path], Any], kept: str, tmp_path: Path
) -> None:
    save_family(tmp_path, "smollm")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[kept] = tensors.pop(TABLE)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load(tmp_path)
    assert torch.equal(matrix(loaded, HEAD), tensors[kept])
    assert torch.equal(matrix(loaded, TABLE), tensors[kept])


@every_loader
def test_gpt_neox_ties_its_head_under_another_name(
    load: Callable[[Path], Any], tmp_path: Path
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = AutoConfig.for_model(
        "gpt_neox", **sizes, num_attention_heads=2, vocab_size=272, tie_word_embeddings=True
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert torch.equal(matrix(load(tmp_path), HEAD), model.lm_head.weight)


@every_loader
def test_old_buffers_may_be_there(load: Callable[[Path], Any], folder: Path) -> None:
    add(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert load(folder) is not None


@every_loader
@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"model.layers.0.mlp.up_proj.weight_scale": torch.ones(64)}, "compressed-tensors"),
        ({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1)}, "DeepSeek"),
        ({"model.layers.0.mlp.up_proj.weight.absmax": torch.ones(4)}, "bitsandbytes"),
        ({"model.layers.0.mlp.up_proj.qweight": torch.ones(4, 4, dtype=torch.int32)}, "GPTQ"),
        ({"model.layers.0.mlp.up_proj.scales": torch.ones(4, 4)}, "MLX"),
        (
            {"model.layers.0.mlp.up_proj.weight": torch.ones(64, 32).to(torch.float8_e4m3fn)},
            "float32, float16 or bfloat16",
        ),
        (
            {"model.layers.0.mlp.up_proj.weight": torch.ones(64, 4, dtype=torch.uint8)},
            "float32, float16 or bfloat16",
        ),
        ({"model.layers.7.mlp.up_proj.weight": torch.ones(64, 32)}, r"model\.layers\.7"),
        ({"lora_A.weight": torch.ones(2, 2)}, "lora_A"),
    ],
)
def test_tensors_that_the_model_does_not_use_are_refused(
    load: Callable[[Path], Any], extra: dict[str, torch.Tensor], said: str, folder: Path
) -> None:
    add(folder, extra)
    with pytest.raises(InputError, match=said):
        load(folder)


@every_loader
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method gptq"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"attn_implementation": "someone/kernel"}, "code from the hub"),
        ({"_attn_implementation": "someone/kernel:fast"}, "code from the hub"),
        ({"architectures": 5}, "architectures"),
    ],
)
def test_a_config_that_no_verb_takes_is_refused(
    load: Callable[[Path], Any], fields: dict[str, Any], said: str, folder: Path
) -> None:
    edit(folder, **fields)
    with pytest.raises(InputError, match=said):
        load(folder)


@every_loader
def test_an_adapter_in_the_folder_is_refused(load: Callable[[Path], Any], folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "no-one/nothing"}')
    with pytest.raises(InputError, match="adapter"):
        load(folder)


@every_loader
@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("mixtral", {"num_local_experts": 2, "num_key_value_heads": 2}, "Mixtures of experts"),
        ("mamba", {"state_size": 4, "expand": 2}, "State-space"),
    ],
)
def test_kinds_that_no_verb_takes_are_refused_alike(
    load: Callable[[Path], Any], kind: str, fields: dict[str, Any], said: str, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = AutoConfig.for_model(kind, **sizes, num_attention_heads=2, vocab_size=272, **fields)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=said):
        load(tmp_path)


@every_loader
@pytest.mark.parametrize(("name", "row"), [(TABLE, 201), ("model.norm.weight", 3)])
def test_a_number_that_is_none_is_named_with_its_row(
    load: Callable[[Path], Any], name: str, row: int, folder: Path
) -> None:
    stored = load_file(folder / "model.safetensors")[name]
    stored[row] = torch.nan
    add(folder, {name: stored})
    with pytest.raises(InputError, match=rf"row {row} .*{name}"):
        matrix(load(folder), name)


@pytest.mark.parametrize(("scale", "said"), [(1e6, "in row"), (1e-9, "as small as")])
@pytest.mark.parametrize("name", [HEAD, "model.norm.weight"])
def test_a_weight_that_float16_does_not_hold_is_refused_by_name(
    scale: float, said: str, name: str, folder: Path
) -> None:
    stored = load_file(folder / "model.safetensors")[name]
    add(folder, {name: stored * scale})
    with pytest.raises(InputError, match=f"(?s){said}.*{name}"):
        Skeleton.load(folder, torch.float16).matrices[name].read()
    assert Skeleton.load(folder, torch.float32)


@every_loader
def test_code_of_a_model_is_not_run_and_not_asked_for(
    load: Callable[[Path], Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", asked)
    (folder / "evil.py").write_text(
        f"open({str(folder / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n"
    )
    references = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    edit(folder, model_type="zz", auto_map=references)
    with pytest.raises(InputError, match="--trust-remote-code"):
        load(folder)
    assert not (folder / "ran").exists()


@every_loader
def test_layers_that_the_weights_do_not_have_are_refused_before_they_are_made(
    load: Callable[[Path], Any], folder: Path
) -> None:
    edit(folder, num_hidden_layers=10**9)
    with pytest.raises(InputError, match="speaks of layers") as caught:
        load(folder)
    assert "num_hidden_layers = 1000000000" in caught.value.details["observed"]
