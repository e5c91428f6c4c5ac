"""A smaller cache, from the command line to a checkpoint, an ONNX graph and the ledger."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.checkpoint.folder import load_checkpoint
from pipeline.checkpoint.modeling_cache import cache_maps
from pipeline.cli.main import main
from pipeline.runtime.sessions.open_session import open_session
from pipeline.runtime.sessions.torch_session import TorchSession
from tests.support.families import save_family
from tests.support.unproven import unproven

TOKENS = (np.arange(40, dtype=np.int64)[None] * 37 + 5) % 256


def compressed(folder: Path, family: str, *options: str, plan: Path | None = None) -> Path:
    """A checkpoint whose cache alone is smaller, in the options' way."""
    model = save_family(folder / "model", family)
    arguments = ["-m", str(model), "-o", str(folder / "small"), "--keep-params", "1"]
    if plan is not None:
        arguments += ["--plan", str(plan)]
    windows = ["--windows", "8", "--window-length", "32", "--overwrite"]
    assert main(["compress", *arguments, *windows, *options]) == 0
    return folder / "small"


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose cache is half as large; not to be written to."""
    return compressed(tmp_path_factory.mktemp("halved"), "llama", "--keep-cache", "0.5")


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("llama", "rebuilt"), ("qwen2", "rebuilt"), ("qwen3", "rebuilt"), ("smollm", "rebuilt"),
        ("qwen2", "narrow"), ("gemma3_text", "stock"),
    ],
)  # fmt: skip
def test_latents_and_what_they_stand_for_give_the_same_logits(
    family: str, form: str, tmp_path: Path
) -> None:
    small = compressed(tmp_path, family, "--keep-cache", "0.5", "--cache-form", form)
    model = load_checkpoint(small, dtype=torch.float32)
    full = TorchSession(model, latent=False).forward(TOKENS)
    latent = TorchSession(model)
    whole = latent.forward(TOKENS)
    assert_same_but_for_codes(whole, full)
    latent.rewind(7)  # by pieces, behind a rewind
    pieces = [
        latent.forward(TOKENS[:, 7:20]),
        *(latent.forward(TOKENS[:, [i]]) for i in range(20, 40)),
    ]
    assert_same_but_for_codes(np.concatenate(pieces, axis=1), full[:, 7:])


def assert_same_but_for_codes(found: np.ndarray, expected: np.ndarray) -> None:
    """The same logits, where a cached number may stand on the border between two codes.

    Sums in another order put it on the other side, which moves what looks at it by one code's step.
    """
    difference = np.abs(found - expected) / np.abs(expected).max()
    assert np.quantile(difference, 0.9) <= 1e-4
    assert difference.max() <= 2e-3


@pytest.mark.parametrize(
    ("profile", "groups"),
    [
        ("compat", "1"),
        ("opset24", "2"),
        pytest.param("compat", "2", marks=pytest.mark.slow),
        pytest.param("opset24", "1", marks=pytest.mark.slow),
    ],
)
def test_a_graph_keeps_latents_and_equals_torch(profile: str, groups: str, tmp_path: Path) -> None:
    small = compressed(
        tmp_path, "llama", "--keep-cache", "0.6", "--cache-bits", "float", "--cache-groups", groups
    )
    onnx = tmp_path / "onnx"
    with unproven():
        assert main(["export", str(small), "-o", str(onnx), "--profile", profile]) == 0
    wanted = TorchSession(load_checkpoint(small, dtype=torch.float32)).forward(TOKENS)
    session = open_session(onnx)
    pieces = [
        session.forward(TOKENS[:, :9]),
        *(session.forward(TOKENS[:, [i]]) for i in range(9, 40)),
    ]
    np.testing.assert_allclose(
        np.concatenate(pieces, axis=1), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max()
    )
    cache = json.loads((onnx / "export.json").read_text())["cache"]
    plan = json.loads((small / "plan.json").read_text())["caches"]
    kept = sum(c["kv_heads"] * c["key_width"] for c in cache) + sum(
        c.get("value_heads", c["kv_heads"]) * c["value_width"] for c in cache
    )
    assert 2 * kept == plan["token_bytes"]


@pytest.mark.parametrize("budget", ["0.2", "0.35", "0.7"])
def test_the_budget_is_met_and_used(budget: str, tmp_path: Path) -> None:
    small = compressed(tmp_path, "llama", "--keep-cache", budget)
    plan = json.loads((small / "plan.json").read_text())["caches"]
    dense = sum(side["dense_bytes"] for side in plan["sides"])
    assert 0.9 * float(budget) * dense <= plan["token_bytes"] <= float(budget) * dense
    report = json.loads((small / "report.json").read_text())["cache"]
    assert report["token_bytes"] == plan["token_bytes"]


def test_a_plan_edited_by_hand_is_followed(tmp_path: Path) -> None:
    small = compressed(tmp_path, "llama", "--keep-cache", "0.5")
    plan = json.loads((small / "plan.json").read_text())
    plan["caches"]["sides"][1] |= {"form": "latent", "groups": 2, "rank": 3, "bits": 4}
    plan["caches"]["sides"][2] |= {"form": "narrow", "groups": 2, "rank": 5, "bits": None}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    again = compressed(tmp_path, "llama", plan=tmp_path / "plan.json")
    maps = cache_maps(load_checkpoint(again))
    made = maps["model.layers.0.self_attn.value_map"]
    assert (made.groups, made.rank, made.bits) == (2, 3, 4)
    keys = maps["model.layers.1.self_attn.key_map"]
    assert (keys.after_rotation, keys.is_rotated, keys.rank) == (True, False, 5)
    assert torch.isfinite(keys.down).all()


def test_a_plan_of_before_is_rounded_as_before(tmp_path: Path) -> None:
    sides = ("key", "value")
    for fed, version in ((True, 5), (None, 3)):
        place = tmp_path / str(version)
        place.mkdir()
        small = compressed(place, "llama", "--keep-cache", "0.5")
        plan = json.loads((small / "plan.json").read_text())
        for side in plan["caches"]["sides"]:
            side |= {"form": "latent", "groups": 1, "rank": 12, "bits": 2}
            del side["error_feedback"]
            side |= {} if fed is None else {"error_feedback": fed}
        (place / "plan.json").write_text(json.dumps(plan))
        model = load_checkpoint(compressed(place, "llama", plan=place / "plan.json"))
        assert model.config.quantization_config.version == version
        made = [cache_maps(model)[f"model.layers.0.self_attn.{side}_map"] for side in sides]
        assert [own.feedback is not None for own in made] == [fed is not None] * 2
        exact = torch.randn(1, 1, 5, 12)
        codes, step, low = made[0].codes_of(exact, 2)
        nearest = ((codes * step + low - exact).abs() <= step * 0.51).all()
        assert nearest == (fed is None)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rank": 17}, "rank"), ({"rank": 0}, "rank"), ({"rank": 3.5}, "rank"),
        ({"groups": 3}, "groups"), ({"bits": 7}, "bits"), ({"form": "wide"}, "form"),
        ({"source": "model.layers.9.self_attn.k_proj"}, "source"),
        ({"form": "narrow", "groups": 1}, "groups"), ({"error_feedback": 1}, "error_feedback"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_is_refused(
    change: dict[str, object],
    says: str,
    halved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = json.loads((halved / "plan.json").read_text())
    side = {"form": "latent", "groups": 2, "rank": 3, "bits": None}
    plan["caches"]["sides"][0] |= side | change
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    arguments = ["-m", str(halved.parent / "model"), "-o", str(tmp_path / "other")]
    assert main(["compress", *arguments, "--plan", str(tmp_path / "plan.json")]) == 3
    assert f"'{says}'" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "status", "says"),
    [
        (["--cache-bytes", "1KB", "--keep-cache", "0.5"], 2, "one budget"),
        (["--keep-cache", "0"], 2, "out of range"),
        (["--keep-cache", "nan"], 2, "not a finite number"),
        (["--cache-bytes", "-3"], 2, "no number of bytes"),
        (["--cache-bytes", "2"], 2, "No cache is so small"),
        (["--keep-cache", "0.5", "--cache-groups", "3"], 2, "so many groups"),
        (["--keep-cache", "0.5", "--cache-groups", "2", "--cache-form", "narrow"], 2, "of its own"),
        (["--keep-cache", "0.5", "--cache-bits", "4", "--cache-form", "stock"], 2, "of its own"),
        (["--keep-cache", "0.5", "--method", "palu", "--cache-form", "narrow"], 2, "of its own"),
        (["--keep-cache", "0.5", "--cache-form", "stock"], 2, "No cache is so small"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(
    options: list[str], status: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_family(tmp_path / "model", "llama")
    arguments = ["-m", str(model), "-o", str(tmp_path / "small"), "--keep-params", "1"]
    windows = ["--windows", "8", "--window-length", "32"]
    assert main(["compress", *arguments, *windows, *options]) == status
    assert says in capsys.readouterr().err


def test_values_are_never_mapped_after_a_rotation(
    halved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = json.loads((halved / "plan.json").read_text())
    plan["caches"]["sides"][1] |= {"form": "narrow", "groups": 2, "rank": 3, "bits": None}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    arguments = ["-m", str(halved.parent / "model"), "-o", str(tmp_path / "other")]
    assert main(["compress", *arguments, "--plan", str(tmp_path / "plan.json")]) == 3
    assert "full or latent" in capsys.readouterr().err


def test_what_cannot_hold_latents_refuses_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = compressed(tmp_path, "llama", "--keep-cache", "0.3", "--cache-bits", "4")
    arguments = ["export", str(small), "-o", str(tmp_path / "cpu"), "--profile", "cpu"]
    assert main(arguments) == 3
    assert "latents" in capsys.readouterr().err
    assert not (tmp_path / "cpu").exists()
