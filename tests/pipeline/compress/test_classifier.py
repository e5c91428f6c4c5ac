"""Classifiers compressed into checkpoints: exact where they should be, and loaded strictly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from pipeline.calibrate.images import load_images
from pipeline.checkpoint.dense import export_dense
from pipeline.checkpoint.folder import load_checkpoint
from pipeline.compress.methods import EFFORTS
from pipeline.compress.request import CompressRequest
from pipeline.compress.run import compress_to_folder, plan_only
from pipeline.errors import InputError, UsageError
from pipeline.model.classifier_structure import ImageStructure
from tests.support.classifiers import (
    FAMILIES,
    processor,
    save_classifier,
    tiny_classifier,
    write_images,
)

SHAPE = (3, 16, 16)
PIXELS = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits_of(model: PreTrainedModel, pixels: torch.Tensor = PIXELS) -> torch.Tensor:
    return model(pixel_values=pixels).logits


def full_rank_plan(family: str, path: Path) -> Path:
    """Every group at full rank: q, k, v in skip form together, the others low-rank and skip."""
    layers: dict[str, list[dict]] = {}
    for layer in ImageStructure.of(tiny_classifier(family), SHAPE).layers:
        layers[layer.name] = [
            {
                "members": list(group.members),
                "rows": sum(group.out_features),
                "columns": group.in_features,
                "form": "low_rank" if place % 2 else "skip",
                "rank": min(sum(group.out_features), group.in_features),
            }
            for place, group in enumerate(layer.groups)
        ]
    path.write_text(json.dumps({"schema": 1, "layers": layers}))
    return path


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("effort", ["fast", "default"])
@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_is_exact_one_shot_and_propagated(
    family: str, effort: str, sources: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    plan = full_rank_plan(family, tmp_path / "plan.json")
    request = CompressRequest(
        str(sources[family]), plan=str(plan), effort=effort, calibration=str(images)
    )
    report = compress_to_folder(request, tmp_path / "checkpoint")
    assert report["totals"]["kept_dense"] == 0
    model = load_checkpoint(tmp_path / "checkpoint")
    # Float32 products of factors, through a dozen layers.
    torch.testing.assert_close(
        logits_of(model), logits_of(tiny_classifier(family)), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_searched_plan_meets_its_budget_and_beats_a_uniform_one(
    family: str, sources: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    # Other images of the kind that it is calibrated on.
    other = load_images(
        str(write_images(tmp_path / "other.npz", 40, seed=5)),
        tiny_classifier(family),
        processor(16),
    ).pixels
    original = logits_of(tiny_classifier(family), other).log_softmax(-1)
    kl = {}
    for method in ("skipcat-kl", "skipcat"):
        request = CompressRequest(
            str(sources[family]), 0.6, method=method, effort="fast", calibration=str(images)
        )
        report = compress_to_folder(request, tmp_path / method)
        assert 0.56 < report["totals"]["kept_fraction"] <= 0.6
        own = logits_of(load_checkpoint(tmp_path / method), other).log_softmax(-1)
        kl[method] = float((original.exp() * (original - own)).sum(-1).mean())
    assert kl["skipcat-kl"] < kl["skipcat"]


CHILD = """
import sys, torch, transformers
torch.set_num_threads(1)
pixels = torch.load(sys.argv[1], weights_only=True)
for folder in sys.argv[2:]:
    model, info = transformers.AutoModelForImageClassification.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == "SkipCatForImageClassification"
    with torch.no_grad():
        torch.save(model.eval()(pixel_values=pixels).logits, f"{sys.argv[1]}.{folder[-4:]}")
assert "pipeline" not in sys.modules
"""


def test_transformers_alone_loads_the_checkpoints_by_their_own_code(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folders = [checkpoints["deit"], checkpoints["swin"]]
    torch.save(PIXELS, tmp_path / "pixels")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", CHILD, str(tmp_path / "pixels"), *map(str, folders)]
    subprocess.run(command, env=environment, check=True, cwd=tmp_path, capture_output=True)
    for folder in folders:
        own = torch.load(tmp_path / f"pixels.{folder.name[-4:]}", weights_only=True)
        torch.testing.assert_close(own, logits_of(load_checkpoint(folder)), rtol=1e-6, atol=1e-6)


def test_the_folder_says_what_it_is(checkpoints: dict[str, Path]) -> None:
    folder = checkpoints["vit"]
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.json", "model.safetensors", "modeling_quantized.py", "modeling_skipcat.py",
        "preprocessor_config.json",
        "plan.json", "plan.svg", "recipe.json", "report.json", "README.md",
    }  # fmt: skip
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["task"] == "image-classification"
    assert recipe["effort"]["windows"] == EFFORTS["default"].windows
    assert recipe["held_dtype"] == "float32"
    assert recipe["calibration"]["images"] == 80
    assert AutoImageProcessor.from_pretrained(folder).size["height"] == 16
    assert "pipeline_tag: image-classification" in (folder / "README.md").read_text()


@pytest.mark.parametrize("kind", ["missing", "superfluous"])
def test_a_checkpoint_without_all_of_its_tensors_is_refused(
    kind: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    for path in checkpoints["vit"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    if kind == "missing":
        del tensors["vit.encoder.layer.0.intermediate.dense.up.weight"]
    else:
        tensors["extra"] = torch.zeros(2)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="not those its config asks for"):
        load_checkpoint(tmp_path)


def test_export_dense_is_the_same_classifier_without_factors(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    export_dense(checkpoints["swin"], tmp_path)
    plain = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(
        logits_of(plain), logits_of(load_checkpoint(checkpoints["swin"])), rtol=1e-4, atol=1e-4
    )
    assert (tmp_path / "preprocessor_config.json").is_file()


def test_an_interrupted_run_goes_on_and_ends_the_same(
    sources: dict[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = CompressRequest(str(sources["swin"]), 0.6, calibration=str(images))
    compress_to_folder(request, tmp_path / "whole")

    def stop(*args: object, **keywords: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr("pipeline.compress.run.save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            compress_to_folder(request, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    monkeypatch.setattr("pipeline.compress.walk.submit_fit", stop_factoring)
    compress_to_folder(request, tmp_path / "again", resume=True)
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def stop_factoring(*args: object, **keywords: object) -> None:
    """In place of the fit of a group, which a resumed run must not call."""
    raise AssertionError("a group is fitted again")


def test_a_budget_of_bytes_is_met_and_used(
    sources: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    request = CompressRequest(
        str(sources["vit"]), keep_bytes=0.7, effort="fast", runtime="any", calibration=str(images)
    )
    report = compress_to_folder(request, tmp_path / "checkpoint")
    whole = 2 * report["totals"]["total_before"]
    assert report["totals"]["stored_bytes"] <= 0.7 * whole + 2048  # the header's own metadata
    assert report["totals"]["in_few_bits"] > 0
    model = load_checkpoint(tmp_path / "checkpoint", dtype=torch.float32)
    top1 = logits_of(model).argmax(-1) == logits_of(tiny_classifier("vit")).argmax(-1)
    assert top1.float().mean() >= 0.6


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_quantiser_leaves_every_rank_whatever_fraction_is_kept(
    method: str, sources: dict[str, Path], images: Path
) -> None:
    request = CompressRequest(
        str(sources["vit"]), 0.6, method=method, weights="int4-b16-asym", runtime="any",
        calibration=str(images),
    )  # fmt: skip
    plan = plan_only(request)
    assert {group.form for group in plan.groups} == {"dense"}
    assert plan.kept_fraction == 1


def test_a_plan_can_be_shown_without_writing_anything(
    sources: dict[str, Path], images: Path
) -> None:
    request = CompressRequest(str(sources["swin"]), 0.5, method="skipcat", calibration=str(images))
    plan = plan_only(request)
    assert len(plan.groups) == 13
    assert plan.kept_fraction <= 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": "self"}, "calibrated on images"),
        ({"window_length": 64}, "for language models"),
        ({"stream_weights": True}, "for language models"),
        ({"table": "int8-b64-sym"}, "for language models"),
        ({"balance": 0.5}, "for language models"),
        ({"rotate": "all"}, "for language models"),
        ({"learn_rounding": True, "mix": 0.5, "keep_bytes": 0.5}, "for language models"),
        ({"keep_params": 0.01}, "No plan keeps so little"),
        ({"keep_bytes": 0.01}, "No plan is so small"),
        ({"keep_params": 0.0}, "out of range"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    changes: dict, message: str, sources: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    wanted = {"calibration": str(images), "effort": "fast"} | changes
    with pytest.raises(UsageError, match=message):
        compress_to_folder(CompressRequest(str(sources["vit"]), **wanted), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_few_images_are_refused_with_how_many_it_takes(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    few = write_images(tmp_path / "few.npz", 2)
    request = CompressRequest(str(sources["vit"]), calibration=str(few))
    with pytest.raises(InputError, match="too few images") as caught:
        compress_to_folder(request, tmp_path / "out")
    assert caught.value.details["expected"] == "at least 4, better 32"


def test_a_model_without_image_processor_is_refused(images: Path, tmp_path: Path) -> None:
    source = save_classifier(tmp_path / "vit", "vit")
    (source / "preprocessor_config.json").unlink()
    request = CompressRequest(str(source), calibration=str(images))
    with pytest.raises(InputError, match="no image processor"):
        compress_to_folder(request, tmp_path / "out")


def test_a_compressed_classifier_is_not_compressed_again(
    checkpoints: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    request = CompressRequest(str(checkpoints["vit"]), calibration=str(images))
    with pytest.raises(InputError, match="compressed or quantised already"):
        compress_to_folder(request, tmp_path / "out")


def test_unequal_layers_are_refused_by_the_method_that_compares_them(
    sources: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    request = CompressRequest(
        str(sources["swin"]), method="svd-llm-v2", effort="fast", calibration=str(images)
    )
    with pytest.raises(UsageError, match="equal layers"):
        compress_to_folder(request, tmp_path / "out")
