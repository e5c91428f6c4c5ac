"""A cache of latents in a graph: every kind of map and rotation, and everything that reads one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from pipeline.bench.targets import traffic_of_folder
from pipeline.checkpoint.folder import load_checkpoint
from pipeline.checkpoint.modeling_cache import CacheMap
from pipeline.cli.main import main
from pipeline.engine.build import build_engine
from pipeline.engine.plan import EngineRequest
from pipeline.engine.target import resolve_target
from pipeline.errors import InputError
from pipeline.export.contract import RECORD_FILE
from pipeline.export.export import prove_model
from pipeline.export.latent_attention import HeldSide
from pipeline.export.latents import GraphLatents, _are_proportional
from pipeline.export.onnx_folder import read_onnx_folder
from pipeline.export.passes.fold_values import VALUES_FOLDED
from pipeline.export.request import ExportRequest
from pipeline.runtime.sessions.onnx_session import OnnxSession
from pipeline.runtime.sessions.slots import open_slots
from pipeline.runtime.sessions.torch_session import TorchSession
from tests.support.families import save_family
from tests.support.unproven import unproven

TOKENS = (np.arange(60, dtype=np.int64).reshape(2, 30) * 37 + 5) % 256
LENGTH = 48


@pytest.fixture(scope="module")
def few_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose cache holds codes of one and of two to a byte, and numbers."""
    root = tmp_path_factory.mktemp("few_bits")
    model = save_family(root / "model", "llama")
    base = ["compress", "-m", str(model), "--keep-params", "1", "--windows", "8"]
    base += ["--window-length", "32"]
    assert main([*base, "-o", str(root / "found"), "--keep-cache", "0.5"]) == 0
    plan = json.loads((root / "found" / "plan.json").read_text())
    chosen = [(1, 11, 4), (2, 7, 8), (1, 16, 5), (1, 12, None)]
    for side, (groups, rank, bits) in zip(plan["caches"]["sides"], chosen, strict=True):
        side |= {"form": "latent", "groups": groups, "rank": rank, "bits": bits}
    (root / "plan.json").write_text(json.dumps(plan))
    assert main([*base, "-o", str(root / "small"), "--plan", str(root / "plan.json")]) == 0
    return root / "small"


@pytest.fixture(
    scope="module",
    params=[
        "opset24",
        pytest.param("compat", marks=pytest.mark.slow),
        pytest.param("compat-static", marks=pytest.mark.slow),
    ],
)
def exported(
    request: pytest.FixtureRequest, few_bits: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "onnx"
    arguments = ["export", str(few_bits), "-o", str(folder), "--profile", request.param]
    assert main([*arguments, "--max-length", str(LENGTH)]) == 0
    return folder


def test_codes_in_the_cache_give_torchs_logits_in_pieces_rewound_and_in_batches(
    exported: Path, few_bits: Path
) -> None:
    wanted = TorchSession(load_checkpoint(few_bits, dtype=torch.float32)).forward(TOKENS)
    session = OnnxSession(exported)
    whole = session.forward(TOKENS)
    session.rewind(7)
    pieces = [session.forward(TOKENS[:, 7:20])]
    pieces += [session.forward(TOKENS[:, [i]]) for i in range(20, 30)]
    for actual, expected in (
        (whole, wanted),
        (np.concatenate(pieces, axis=1), wanted[:, 7:]),
    ):
        cosine = (actual * expected).sum() / np.linalg.norm(actual) / np.linalg.norm(expected)
        assert cosine > 0.99999
        assert (actual.argmax(-1) == expected.argmax(-1)).all()


def test_slots_share_the_graph_and_keep_their_own_codes(exported: Path) -> None:
    alone, slots = OnnxSession(exported), open_slots(exported, slots=2)
    for slot in (0, 1):
        slots.prefill(slot, TOKENS[slot, :9])
    slots.rewind_slot(1, 5)
    slots.prefill(1, TOKENS[1, 5:9])
    both = slots.decode([0, 1], [int(TOKENS[0, 9]), int(TOKENS[1, 9])])
    for slot in (0, 1):
        alone.reset()
        expected = alone.forward(TOKENS[[slot], :10])[0, -1]
        np.testing.assert_allclose(both[slot], expected, rtol=0, atol=1e-4)


def test_what_a_token_takes_is_what_the_cache_holds(
    exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = OnnxSession(exported)
    session.forward(TOKENS[:1])
    slots = LENGTH if session.record.traits.static_cache else TOKENS.shape[1]
    held = sum(np.prod(v.shape()) * v.numpy().itemsize for v in session._cache.values()) / slots
    # Keys: 11 codes, two to a byte; then 2 x 7, and 16; steps of 4 bytes; 12 numbers of 4 bytes.
    assert held == (6 + 4) + 2 * (7 + 4) + (16 + 4) + 12 * 4
    capsys.readouterr()
    assert main(["inspect", str(exported), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["KV cache, bytes a token"] == f"{held:.0f}"
    traffic = traffic_of_folder(exported)
    assert traffic.cache_bytes(slots) == held * slots
    # Keys of 2 heads of 8 numbers: of 12 latent ones, two of 4 bits to a byte, and of 16.
    assert traffic.rebuild_flop(slots) == slots * 2 * 16 * (12 + 16)
    assert [keys.latent_bytes for keys in traffic.rebuilt] == [6 + 4, 16 + 4]
    record = json.loads((exported / RECORD_FILE).read_text())["cache"]
    assert record[0]["key_form"] == "codes, two to a byte"
    assert (record[0]["key_bits"], record[0]["value_bits"]) == (4, 8)
    assert "value_bits" not in record[1]


def test_the_graph_is_proven_by_a_twin_with_latents(exported: Path) -> None:
    record = json.loads((exported / RECORD_FILE).read_text())
    assert record["proof"]["relative_error"] <= record["proof"]["tolerance"]
    assert any(name.startswith("LatentAttentionRebuilt") for name in record["nodes"])
    # Of 4 heads of 8 numbers each: 7 latent ones make the matrix behind smaller, 12 larger.
    assert record["fused"][VALUES_FOLDED] == 1


@pytest.mark.parametrize("damage", [[{}], "codes", [{"key_bits": 4}, 3]])
def test_a_record_whose_cache_is_none_of_ours_is_refused(
    damage: object, exported: Path, tmp_path: Path
) -> None:
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    record = json.loads((tmp_path / RECORD_FILE).read_text()) | {"cache": damage}
    (tmp_path / RECORD_FILE).write_text(json.dumps(record))
    with pytest.raises(InputError, match="cache"):
        OnnxSession(tmp_path)


ENTRY = {"groups": 1, "bits": None, "heads": 1, "width": 1, "rank": 1, "is_rotated": True}


def config_with_latents(kind: str, bits: int | None, groups: int, **changes: Any) -> Any:
    """Of a model whose checkpoint would have maps of both sides."""
    fields = {
        "vocab_size": 272, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    own: dict[str, Any] = ENTRY | {"bits": bits, "groups": groups}
    if changes.pop("fed", False):
        own |= {"clip": 0.8, "error_feedback": True}
    config = AutoConfig.for_model(kind, **fields | changes)
    caches = {side: own | {"side": side} for side in ("key", "value")}
    config.quantization_config = {"caches": caches}
    return config


@pytest.mark.parametrize(
    ("kind", "bits", "groups", "profile", "changes"),
    [
        # Turned in neighbouring pairs; half of a key turned; not turned; scores that are capped.
        ("cohere", None, 1, "opset24", {"num_key_value_heads": 2}),
        pytest.param(
            "glm", 4, 2, "compat-static", {"num_key_value_heads": 2, "head_dim": 16},
            marks=pytest.mark.slow,
        ),
        ("opt", 4, 1, "compat", {"ffn_dim": 64, "word_embed_proj_dim": 64, "fed": True}),
        pytest.param(
            "gemma2", 6, 2, "opset24", {"num_key_value_heads": 2, "head_dim": 16},
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_a_rotation_of_any_kind_is_proven(
    kind: str, bits: int | None, groups: int, profile: str, changes: dict[str, Any],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("SKIPCAT_CACHE", str(tmp_path))
    config = config_with_latents(kind, bits, groups, **changes)
    proof = prove_model(config, ExportRequest(profile, max_length=128))
    assert proof["relative_error"] <= proof["tolerance"]
    assert bits is not None or proof["tolerance"] == 1e-4


@pytest.mark.slow
def test_keys_turned_in_a_way_that_is_not_of_halves_are_rebuilt_before_the_op(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKIPCAT_CACHE", str(tmp_path))
    monkeypatch.setattr(GraphLatents, "_as_halves", lambda *arguments: None)
    config = config_with_latents("llama", 3, 1, num_key_value_heads=2, intermediate_size=64)
    proof = prove_model(config, ExportRequest("compat", max_length=128))
    assert proof["relative_error"] <= proof["tolerance"]


@pytest.mark.parametrize(("bits", "rank"), [(2, 5), (4, 6), (5, 5), (8, 3), (None, 4)])
def test_what_is_packed_stands_for_what_torch_rounds_to(bits: int | None, rank: int) -> None:
    latent = torch.randn(2, 3, 4, rank)
    for fed in (False, True):
        made = CacheMap(3, rank, 3, rank, bits, clip=0.8 if fed else 1.0, error_feedback=fed)
        if made.feedback is not None:
            made.feedback.data.normal_()
        held = HeldSide.of(latent, made)
        expected = latent
        if bits is not None:
            codes, step, low = made.codes_of(latent, bits)
            expected = codes * step + low
        assert torch.equal(held.numbers(rank, torch.float32), expected)


def float16_export(checkpoint: Path, folder: Path, profile: str) -> Path:
    arguments = ["export", str(checkpoint), "-o", str(folder), "--profile", profile]
    with unproven():
        assert main([*arguments, "--max-length", str(LENGTH), "--dtype", "float16"]) == 0
    return folder


def test_codes_go_into_a_cache_that_grows_or_that_the_plugin_writes(exported: Path) -> None:
    folder = read_onnx_folder(exported)
    form = folder.record.traits
    if not form.static_cache or form.plugin_writes:
        folder.require_cache_in_place()
        return
    with pytest.raises(InputError, match="no codes into a cache of fixed length"):
        folder.require_cache_in_place()


@pytest.mark.slow
def test_an_rtx_engine_holds_codes_in_a_growing_cache(few_bits: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    request = EngineRequest(resolve_target("sm86"), max_prefill=8)
    folder = float16_export(few_bits, tmp_path / "growing", "compat")
    manifest = build_engine(folder, tmp_path / "engine", request)
    assert len(manifest["onnx"]["coded"]) == 3
    assert manifest["layer_types"]["SOFTMAX"] == 2
    # Keys of 8 numbers are none of the kernels', so no plugin would be asked.
    assert manifest["latent_attention"] == {"nodes": 0, "path": "none"}
    widths = {
        name.removeprefix("past_key_values."): (ends["max"][1], ends["max"][3])
        for name, ends in manifest["profiles"][0]["shapes"].items()
        if name.startswith("past_key_values.")
    }
    assert widths == {
        "0.key": (1, 6), "0.key_steps": (1, 2), "0.value": (2, 7), "0.value_steps": (2, 2),
        "1.key": (1, 16), "1.key_steps": (1, 2), "1.value": (1, 12),
    }  # fmt: skip
    traffic = traffic_of_folder(tmp_path / "engine")
    assert traffic.cache_bytes(1) == (6 + 4) + 2 * (7 + 4) + (16 + 4) + 12 * 2


def test_an_rtx_engine_writes_latents_in_place(few_bits: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    plan = json.loads((few_bits / "plan.json").read_text())
    for side in plan["caches"]["sides"]:
        side["bits"] = None
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    model = few_bits.parent / "model"
    base = ["compress", "-m", str(model), "--keep-params", "1", "--windows", "8"]
    base += ["--window-length", "32", "--plan", str(tmp_path / "plan.json")]
    assert main([*base, "-o", str(tmp_path / "small")]) == 0
    folder = float16_export(tmp_path / "small", tmp_path / "onnx", "opset24")
    request = EngineRequest(resolve_target("sm89"), max_prefill=8)
    manifest = build_engine(folder, tmp_path / "engine", request)
    assert manifest["layer_types"]["KV_CACHE_UPDATE"] == 4
    shapes = manifest["profiles"][0]["shapes"]
    assert shapes["past_key_values.0.key"]["max"] == [1, 1, LENGTH, 11]


def test_only_angles_that_are_proportional_to_the_position_are_left_to_the_op() -> None:
    # The kernels turn a key by the first position of a tile, then by what it is beyond that.
    angles = torch.arange(4096).double()[:, None] * 1e4 ** -torch.linspace(0, 1, 8).double()
    factor = torch.linspace(0.8, 1.2, 8).double()  # as YaRN stretches
    cos, sin = ((factor * part).float() for part in (angles.cos(), angles.sin()))
    assert _are_proportional(cos, sin)
    assert _are_proportional(cos[:1], sin[:1])
    places = torch.arange(4096)[:, None]
    bent = angles * (1 + 0.01 * (places > 2000))  # other ones beyond a length, as of long-rope
    assert not _are_proportional(bent.cos().float(), bent.sin().float())
