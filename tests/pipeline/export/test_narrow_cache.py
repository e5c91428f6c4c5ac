"""Keys that are mapped after they were turned: narrower heads, read by stock attention."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from pipeline.checkpoint.folder import load_checkpoint
from pipeline.cli.main import main
from pipeline.engine.build import build_engine
from pipeline.engine.plan import EngineRequest
from pipeline.engine.target import resolve_target
from pipeline.errors import InputError
from pipeline.export.contract import CONTRIB, GENAI_FILE, RECORD_FILE
from pipeline.export.export import prove_model
from pipeline.export.passes.fold_values import VALUES_FOLDED
from pipeline.export.request import ExportRequest
from pipeline.runtime.sessions.open_session import open_session
from pipeline.runtime.sessions.torch_session import TorchSession
from tests.pipeline.export.test_latents import ENTRY, config_with_latents
from tests.support.families import save_family

TOKENS = (np.arange(30, dtype=np.int64)[None] * 37 + 5) % 256
# TensorRT for RTX has kernels for heads of 24 numbers, and none for heads of 8.
LENGTH, WIDTH, NARROW = 48, 32, 24
_Export = Callable[..., Path]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose heads are narrower in the cache: as narrow as they may become."""
    root = tmp_path_factory.mktemp("stock")
    model = save_family(root / "model", "qwen3", head_dim=WIDTH)
    base = ["compress", "-m", str(model), "-o", str(root / "small"), "--keep-params", "1"]
    base += ["--windows", "8", "--window-length", "32"]
    kept = str(NARROW / WIDTH)
    assert main([*base, "--keep-cache", kept, "--cache-form", "stock"]) == 0
    return root / "small"


@pytest.fixture(scope="module")
def export(stock: Path, tmp_path_factory: pytest.TempPathFactory) -> _Export:
    @cache
    def write(profile: str, *options: str) -> Path:
        folder = tmp_path_factory.mktemp(profile) / "onnx"
        arguments = ["export", str(stock), "-o", str(folder), "--profile", profile, *options]
        assert main([*arguments, "--max-length", str(LENGTH)]) == 0
        return folder

    return write


@pytest.mark.parametrize(
    ("profile", "options", "attention"),
    [
        ("opset24", (), ("", "Attention")),
        pytest.param(
            "cpu", ("--weights", "float"), (CONTRIB, "GroupQueryAttention"),
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_stock_attention_reads_narrower_heads_and_equals_torch(
    profile: str, options: tuple[str, ...], attention: tuple[str, str], stock: Path, export: _Export
) -> None:
    folder = export(profile, *options)
    wanted = TorchSession(load_checkpoint(stock, dtype=torch.float32)).forward(TOKENS)
    session = open_session(folder)
    session.forward(TOKENS)
    session.rewind(7)
    pieces = [session.forward(TOKENS[:, 7:20])]
    pieces += [session.forward(TOKENS[:, [i]]) for i in range(20, 30)]
    np.testing.assert_allclose(
        np.concatenate(pieces, axis=1), wanted[:, 7:], rtol=0, atol=1e-5 * np.abs(wanted).max()
    )
    record = json.loads((folder / RECORD_FILE).read_text())
    assert record["cache"] == [{"kv_heads": 2, "key_width": NARROW, "value_width": NARROW}] * 2
    assert record["fused"][VALUES_FOLDED] == 2
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    assert [(n.domain, n.op_type) for n in graph.node].count(attention) == 2
    # All layers alike: what onnxruntime-genai takes from its file is true of each.
    genai = json.loads((folder / GENAI_FILE).read_text())
    assert genai["model"]["decoder"]["head_size"] == NARROW


def test_a_cache_is_not_rounded_besides(
    stock: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(stock), "-o", str(tmp_path / "cpu"), "--profile", "cpu"]
    assert main([*arguments, "--cache", "int8"]) == 3
    assert "--cache float" in capsys.readouterr().err
    assert not (tmp_path / "cpu").exists()


def narrow(kind: str, rank: tuple[int, int], bits: int | None, **changes: Any) -> Any:
    """The config of a checkpoint with narrow keys, and values of another rank perhaps."""
    config = config_with_latents(kind, bits, 2, num_key_value_heads=2, **changes)
    own = ENTRY | {"groups": 2, "heads": 2, "bits": bits}
    config.quantization_config = {
        "caches": {
            "a.k": own | {"side": "key", "rank": rank[0], "after_rotation": True},
            "a.v": own | {"side": "value", "rank": rank[1]},
        }
    }
    return config


@pytest.mark.parametrize(
    ("kind", "rank", "bits", "profile", "changes"),
    [
        # Of two widths; in codes; turned in pairs of neighbours; capped, so that keys are rebuilt.
        ("llama", (5, 7), None, "opset24", {"intermediate_size": 64}),
        ("llama", (5, 7), None, "compat", {"intermediate_size": 64}),
        ("cohere", (7, 7), None, "cpu", {}),
        pytest.param("gemma2", (5, 5), 4, "compat", {"head_dim": 16}, marks=pytest.mark.slow),
    ],
)
def test_narrow_keys_of_any_kind_are_proven(
    kind: str, rank: tuple[int, int], bits: int | None, profile: str, changes: dict[str, Any],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("SKIPCAT_CACHE", str(tmp_path))
    config = narrow(kind, rank, bits, **changes)
    proof = prove_model(config, ExportRequest(profile, max_length=64))
    assert proof["relative_error"] <= proof["tolerance"]


def test_capped_scores_of_narrow_keys_are_refused_where_a_node_writes_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKIPCAT_CACHE", str(tmp_path))
    with pytest.raises(InputError):
        prove_model(narrow("gemma2", (5, 5), None, head_dim=16), ExportRequest("cpu"))


@pytest.mark.slow
def test_an_rtx_engines_own_attention_is_narrower(export: _Export, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    folder = export("opset24", "--dtype", "float16")
    for target in ("sm86", "sm89"):
        request = EngineRequest(resolve_target(target), max_prefill=8)
        manifest = build_engine(folder, tmp_path / target, request)
        types = manifest["layer_types"]
        assert types["KV_CACHE_UPDATE"] == 4
        assert types["ATTENTION_INPUT"] == types["ATTENTION_OUTPUT"] == 2
        shapes = manifest["profiles"][0]["shapes"]
        for side in ("key", "value"):
            assert shapes[f"past_key_values.1.{side}"]["max"] == [1, 2, LENGTH, NARROW]
