from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.checkpoint import dense
from pipeline.checkpoint.folder import load_checkpoint
from pipeline.cli.main import main
from tests.support.families import save_family, tiny_model


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed qwen2, whose biases have to survive."""
    root = tmp_path_factory.mktemp("compressed")
    model = save_family(root / "model", "qwen2")
    arguments = ["compress", "-m", str(model), "-o", str(root / "small"), "--keep-params", "0.6"]
    assert main([*arguments, "--windows", "4", "--window-length", "32"]) == 0
    return root / "small"


def test_the_dense_model_is_plain_and_gives_the_same_logits(
    compressed: Path, tmp_path: Path
) -> None:
    dense = tmp_path / "dense"
    assert main(["export-dense", str(compressed), "-o", str(dense)]) == 0
    config = json.loads((dense / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert not {"quantization_config", "auto_map"} & config.keys()
    assert not list(dense.glob("*.py"))
    original = tiny_model("qwen2").state_dict()
    tensors = load_file(dense / "model.safetensors")
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in original.items()}

    model, info = AutoModelForCausalLM.from_pretrained(dense, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = AutoTokenizer.from_pretrained(dense)("the same text", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model.eval()(tokens).logits
        factored = load_checkpoint(compressed)(tokens).logits
        unlike = tiny_model("qwen2")(tokens).logits
    # One matrix instead of two: float32 rounding of sums of up to 64 terms.
    assert torch.allclose(logits, factored, rtol=0, atol=1e-4)
    assert (logits - unlike).abs().max() > 1e-2


def test_an_existing_output_is_refused_and_can_be_replaced(
    compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export-dense", str(compressed), "-o", str(tmp_path / "dense")]
    assert main(arguments) == 0
    (tmp_path / "dense" / "stale.txt").write_text("stale")
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert not (tmp_path / "dense" / "stale.txt").exists()
    assert (tmp_path / "dense" / "model.safetensors").exists()


def test_a_disk_too_full_for_the_dense_weights_is_noticed_before_they_are_made(
    compressed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dense_bytes = sum(p.numel() * p.element_size() for p in tiny_model("qwen2").parameters())
    arguments = ["export-dense", str(compressed), "-o", str(tmp_path / "dense")]
    with monkeypatch.context() as patch:
        # More than the factors take, less than their products.
        free = SimpleNamespace(free=dense_bytes - 1)
        patch.setattr(shutil, "disk_usage", lambda path: free)
        patch.setattr(dense, "load_checkpoint", None)
        assert main(arguments) == 4
    assert "Not enough disk space" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["absent", "empty", "truncated"])
def test_a_checkpoint_that_is_not_whole_leaves_nothing_behind(
    damage: str, compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    if damage == "empty":
        broken.mkdir()
    if damage == "truncated":
        shutil.copytree(compressed, broken)
        weights = broken / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["export-dense", str(broken), "-o", str(tmp_path / "dense")]) == 3
    assert str(broken) in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} <= {"broken"}
