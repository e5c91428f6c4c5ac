"""A model with code of its own: its checkpoint carries the code, and no verb runs it unasked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, dynamic_module_utils

from pipeline.checkpoint.dense import export_dense
from pipeline.checkpoint.folder import load_checkpoint
from pipeline.checkpoint.skeleton import Skeleton
from pipeline.compress.request import CompressRequest
from pipeline.compress.run import compress_to_folder
from pipeline.errors import InputError
from pipeline.model.load import load_model
from tests.support.families import save_family
from validate.artefacts import Artefacts
from validate.decoder import DECODER
from validate.stages import _open_rounded, standard_stages

TOKENS = torch.arange(20)[None]
CONFIG = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODEL = """
from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The model, compressed, and multiplied out again."""
    root = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(root / "modules"))
        model = save_family(root / "model", "llama", layers=1)
        (model / "configuration_own.py").write_text(CONFIG)
        (model / "modeling_own.py").write_text(MODEL)
        path = model / "config.json"
        references = {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        }
        fields = json.loads(path.read_text()) | {"model_type": "own", "auto_map": references}
        path.write_text(json.dumps(fields | {"architectures": ["OwnForCausalLM"]}))
        request = CompressRequest(
            str(model), method="skipcat", calibration="self", windows=4, window_length=32,
            trust_remote_code=True,
        )  # fmt: skip
        compress_to_folder(request, root / "small")
        (root / "dense").mkdir()
        export_dense(root / "small", root / "dense", trust_remote_code=True)
        yield root


def test_its_checkpoint_carries_the_code_that_its_config_points_to(folders: Path) -> None:
    for name in ("small", "dense"):
        fields = json.loads((folders / name / "config.json").read_text())
        for reference in fields["auto_map"].values():
            assert (folders / name / f"{reference.partition('.')[0]}.py").is_file()


def test_every_loader_takes_it_when_it_is_trusted(folders: Path) -> None:
    small = load_checkpoint(folders / "small", trust_remote_code=True)
    dense = load_model(str(folders / "dense"), trust_remote_code=True).model
    alone = AutoModelForCausalLM.from_pretrained(folders / "small", trust_remote_code=True)
    skeleton = Skeleton.load(folders / "small", torch.float32, trust_remote_code=True)
    assert type(skeleton.model).__name__ == type(small).__name__ == "OwnForCausalLM"
    with torch.no_grad():
        expected = small(TOKENS).logits
        torch.testing.assert_close(dense(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone(TOKENS).logits, expected)


@pytest.mark.parametrize("name", ["model", "small", "dense"])
def test_no_loader_runs_it_unasked(folders: Path, name: str) -> None:
    with pytest.raises(InputError, match="--trust-remote-code"):
        load_checkpoint(folders / name)
    with pytest.raises(InputError, match="--trust-remote-code"):
        Skeleton.load(folders / name, torch.float32)


def test_the_ledger_opens_it_where_it_is_trusted_and_only_there(folders: Path) -> None:
    artefacts = Artefacts(str(folders / "model"), folders / "small")
    for trusted in (True, False):
        stages = standard_stages(
            artefacts, DECODER.openers, lambda: None, trust_remote_code=trusted
        )[1:]
        assert len(stages) == 2
        for stage in stages:
            if trusted:
                assert type(stage.open().model).__name__ == "OwnForCausalLM"
            else:
                with pytest.raises(InputError, match="--trust-remote-code"):
                    stage.open()


def test_so_does_the_stage_of_a_rounded_cache(folders: Path) -> None:
    openers = replace(DECODER.openers, rounded_cache=lambda model, folder, name: model)
    model = str(folders / "model")
    for artefacts in (Artefacts(model, folders / "small"), Artefacts(model)):
        opened = _open_rounded(artefacts, openers, folders, "rounded", True)
        assert type(opened).__name__ == "OwnForCausalLM"
        with pytest.raises(InputError, match="--trust-remote-code"):
            _open_rounded(artefacts, openers, folders, "rounded", False)
