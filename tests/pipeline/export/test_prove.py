"""What the tracer assumes is checked for every model, in seconds, before a graph is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from pipeline.checkpoint.skeleton import Skeleton
from pipeline.errors import InputError
from pipeline.export.export import _write_graph, export_folder, prove_model
from pipeline.export.prove import prove
from pipeline.export.request import ExportRequest
from pipeline.export.rotary import _constant_angles_length, bounded_length
from pipeline.export.tracing import traced_graph
from tests.support.families import save_family
from tests.support.tiny_decoder import byte_tokenizer

LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 128,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [3.0 + 0.5 * i for i in range(8)],
}  # fmt: skip


def config_of(kind: str, **changes: Any) -> PreTrainedConfig:
    fields = {
        "vocab_size": 272, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return AutoConfig.for_model(kind, **{**fields, **changes})


def test_a_proof_goes_past_the_window_and_any_later_export_has_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKIPCAT_CACHE", str(tmp_path))
    config = config_of("mistral", num_key_value_heads=2, sliding_window=64)
    first = prove_model(config, ExportRequest(max_length=512))
    assert first["relative_error"] < 1e-5 < first["tolerance"] <= 1e-4
    assert first["tokens"] > 16 + 8
    config.name_or_path = "elsewhere"

    def anew(*arguments: object) -> dict[str, Any]:
        raise AssertionError("it is proven anew")

    wanted = ExportRequest(max_length=256, products="float")
    assert prove(config, wanted, anew) == first
    monkeypatch.setattr("pipeline.export.prove.sources_sha256", lambda: "of other code")
    with pytest.raises(AssertionError, match="anew"):
        prove(config, wanted, anew)
    monkeypatch.undo()
    monkeypatch.setenv("SKIPCAT_CACHE", str(tmp_path))
    known = json.loads((tmp_path / "proofs.json").read_text())
    (tmp_path / "proofs.json").write_text(json.dumps({key: {"twin": 1} for key in known}))
    with pytest.raises(AssertionError, match="anew"):
        prove(config, wanted, anew)


@pytest.mark.parametrize("kind", ["gptj", "falcon", "bloom", "xglm", "gpt_neo"])
def test_a_class_that_attends_in_its_own_way_is_refused(kind: str) -> None:
    changes: dict[str, Any] = {"rotary_dim": 16} if kind == "gptj" else {}
    if kind == "gpt_neo":
        changes = {"attention_types": [[["global", "local"], 1]]}
    with pytest.raises(InputError, match="attention interface"):
        prove_model(config_of(kind, **changes), ExportRequest())


@pytest.mark.parametrize(
    ("kind", "changes", "profile", "reason"),
    [
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16}, "opset24",
         "Mixtures of experts are not supported"),
        ("diffllama", {"num_key_value_heads": 2}, "cpu", "change behind the cache"),
        ("doge", {"num_key_value_heads": 2}, "cpu", "mask of its own"),
    ],
)  # fmt: skip
def test_what_attention_takes_beside_a_mask_is_refused_in_words_of_ours(
    kind: str, changes: dict[str, Any], profile: str, reason: str
) -> None:
    with pytest.raises(InputError) as caught:
        prove_model(config_of(kind, **changes), ExportRequest(profile))
    assert reason in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_config_without_a_decoder_is_refused_and_no_internal_error() -> None:
    with pytest.raises(InputError, match="class cannot be made of its config"):
        prove_model(AutoConfig.for_model("vit_mae"), ExportRequest())


def test_a_refusal_names_the_class_and_not_the_twins_folder() -> None:
    with pytest.raises(InputError, match="State-space") as caught:
        prove_model(config_of("mamba"), ExportRequest())
    assert caught.value.details["where"] == "MambaForCausalLM"


def test_dynamic_ntk_is_refused_in_one_sentence() -> None:
    rotary = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    with pytest.raises(InputError, match="dynamic NTK scaling is not exported"):
        prove_model(config_of("llama", rope_parameters=rotary), ExportRequest())


def test_a_graph_that_differs_is_refused_with_the_length_from_which_it_does() -> None:
    config = config_of("mistral", num_key_value_heads=2, sliding_window=64)

    def without_window(skeleton: Skeleton, request: ExportRequest, folder: Path) -> dict[str, Any]:
        skeleton.model.config.sliding_window = None
        return _write_graph(skeleton, request, "float", folder)[0].record

    wanted = ExportRequest(max_length=44)  # no proof of another test is taken for it
    with pytest.raises(InputError, match="would not compute what the model computes") as caught:
        prove(config, wanted, without_window)
    assert "from length 17 on (1 token behind 16 in the cache)" in caught.value.details["observed"]


def test_float16_may_differ_by_what_transformers_loses_in_it() -> None:
    config = config_of("llama", num_key_value_heads=2)
    proof = prove_model(config, ExportRequest(dtype="float16"))
    assert 1e-5 < proof["relative_error"] <= proof["tolerance"] < 0.05


def test_long_rope_is_exported_up_to_its_original_context() -> None:
    config = config_of(
        "phi3", rope_parameters=LONG_ROPE, original_max_position_embeddings=128, sliding_window=None
    )
    assert _constant_angles_length(config) == 128
    assert bounded_length(config, 100) == (100, None)
    length, reason = bounded_length(config, 4096)
    assert length == 128
    assert "original context" in str(reason)
    assert _constant_angles_length(config_of("llama")) is None
    assert bounded_length(config_of("llama"), 512) == (512, None)
    length, reason = bounded_length(config_of("llama"), 513)
    assert length == 512
    assert "made for 512 positions" in str(reason)
    assert prove_model(config, ExportRequest(profile="cpu"))["tokens"] == 32


def test_a_refused_export_writes_nothing(tmp_path: Path) -> None:
    config = config_of("gptj", rotary_dim=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="attention interface"):
        export_folder(tmp_path / "model", tmp_path / "onnx", ExportRequest())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_vectors_of_any_size_are_computed_with_and_the_proof_is_recorded(tmp_path: Path) -> None:
    config = config_of("phi", vocab_size=20_000)  # the bias of its head is of 80 kB
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    export_folder(tmp_path / "model", tmp_path / "onnx", ExportRequest(max_length=32))
    record = json.loads((tmp_path / "onnx" / "export.json").read_text())
    assert record["proof"]["twin"] == "PhiForCausalLM"
    assert record["proof"]["relative_error"] <= record["proof"]["tolerance"]


class _Folding(nn.Module):
    """Computes with a matrix, which holds no numbers while it is traced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: nn.Module = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        weight = self.model.get_parameter("lm_head.weight")
        return (weight[:2, :4] * 2.0).sum() + ids


def test_a_stand_in_that_was_computed_with_is_found_however_small(tmp_path: Path) -> None:
    skeleton = Skeleton.load(save_family(tmp_path / "m", "llama", hidden_size=16), torch.float32)
    with pytest.raises(InputError, match="computed"):
        traced_graph(
            skeleton, _Folding(skeleton.model), (torch.zeros(2, 3),), rehearse=False,
            opset_version=18,
        )  # fmt: skip
