"""The compressed checkpoint: an ordinary Hugging Face folder, written whole and loaded strictly."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.image_processing_base import ImageProcessingMixin

from pipeline.artefact import write_json
from pipeline.checkpoint import modeling_cache, modeling_quantized, modeling_skipcat
from pipeline.checkpoint.modeling_cache import SmallCacheConfig
from pipeline.errors import InputError
from pipeline.json_file import json_field, read_json_object
from pipeline.known_hashes import known_sha256
from pipeline.model.check import check_folder
from pipeline.model.loading import (
    empty_model,
    explaining,
    require_tensors,
    settle_ties,
    silence_transformers,
)
from pipeline.model.numbers import cast, require_finite, require_finite_model
from pipeline.model.structure import refuse_other_architectures
from pipeline.model.task import (
    TASKS,
    Task,
    know_own_classes,
    task_of_config,
    task_of_folder,
)
from pipeline.model.weight_files import weight_files
from pipeline.tokenizer_files import copy_tokenizer

REMOTE_MODULES = "transformers_modules."
_BASE = "SkipCatBase"
# Files of our own that a checkpoint carries.
_OURS = ("modeling_quantized", "modeling_skipcat", "modeling_latent_codes", "modeling_cache")
# What weights are stored in, by the names that recipe.json and --dtype give.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# save_pretrained holds one shard in memory a second time.
_LARGEST_SHARD = "2GB"
_REPORT, _WEIGHTS = "report.json", "weights"
_KINDS = ("missing_keys", "unexpected_keys", "mismatched_keys")


@dataclass(frozen=True)
class _OwnCode:
    """The code of a model whose class is none of transformers'.

    Attributes:
        folder: where its files are; None for a model of transformers.
        references: `auto_map` of its config, without the names of hub repositories.
        base: file and class of the model, as `auto_map` spells them.
    """

    folder: Path | None
    references: dict[str, Any]
    base: str

    @classmethod
    def of(cls, model: PreTrainedModel, source: Path | None) -> _OwnCode:
        """The code of a model.

        Args:
            model: as it was loaded.
            source: the folder that it was loaded from.
        """
        module, _, file = type(model).__module__.rpartition(".")
        if source is None or not module.startswith(REMOTE_MODULES.rstrip(".")):
            return cls(None, {}, "")
        listed = getattr(model.config, "auto_map", None) or {}
        references = {
            name: _without_repository(reference)
            for name, reference in listed.items()
            if name != _BASE and str(reference).partition(".")[0] not in _OURS
        }
        return cls(source, references, f"{file}.{type(model).__name__}")

    def auto_map(self, loaded_by: str = _BASE) -> dict[str, Any]:
        """What the checkpoint's `auto_map` says of it; empty for a model of transformers.

        Args:
            loaded_by: the entry that names the model's class.
        """
        return self.references | {loaded_by: self.base} if self.folder else {}

    def copy(self, folder: Path) -> None:
        """Put its files into a folder: all that lie together, since they import one another."""
        files = self.folder.glob("*.py") if self.folder else ()
        for path in (file for file in files if file.stem not in _OURS):
            shutil.copyfile(path, folder / path.name)


def _without_repository(reference: Any) -> Any:
    """`auto_map` entries may begin with the repository that they are in."""
    if isinstance(reference, str):
        return reference.rpartition("--")[2]
    return [None if name is None else _without_repository(name) for name in reference]


def _own_class(config: Any, folder: Path) -> Any:
    """The class of a checkpoint that skipcat made of a model with code; runs that code.

    The class that transformers alone would load is made from this one, by modeling_skipcat.py; it
    brings definitions of the factored layers that are not those of this process.
    """
    reference = (getattr(config, "auto_map", None) or {}).get(_BASE)
    return None if reference is None else get_class_from_dynamic_module(reference, folder)


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | ImageProcessingMixin,
    modules: dict[str, dict[str, Any]],
    folder: Path,
    dtype: torch.dtype,
    *,
    source: Path | None = None,
    caches: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Write config, weights, tokenizer, chat template and the code that loads them.

    Args:
        model: with its factored layers in place.
        tokenizer: saved beside it; of an image classifier, its image processor.
        modules: `quantization_config.modules`; empty when nothing was factored.
        folder: exists.
        dtype: of all floating-point weights on disk.
        source: the folder that the model was read from. If it holds tokenizer.json, its files go
            over as they are: saving them anew would change how some of them split text.
        caches: `quantization_config.caches`; None for a cache as it is.

    Raises:
        InputError: a weight is not finite, or does not fit `dtype`.
    """
    config = model.config
    task = task_of_config({"architectures": [type(model).__name__]})
    own_code = _OwnCode.of(model, source)
    code = modeling_cache if caches else modeling_skipcat
    if modules or caches:
        # Not model.hf_quantizer: with one, save_pretrained ignores the state that it is given.
        config.quantization_config = SmallCacheConfig(modules, caches=caches)
        file = code.__name__.rpartition(".")[2]
        config.auto_map = own_code.auto_map() | {
            TASKS[task].auto_class: f"{file}.{_remote_class(task)}"
        }
    else:
        config.auto_map = own_code.auto_map(TASKS[task].auto_class)
        if not config.auto_map:
            del config.auto_map
    model.save_pretrained(
        folder, state_dict=_cast_state(model, dtype), max_shard_size=_LARGEST_SHARD
    )
    # save_pretrained names the type the weights had in memory.
    saved = read_json_object(folder / "config.json")
    write_json(folder / "config.json", saved | {"dtype": str(dtype).removeprefix("torch.")})
    if source is not None and (source / "tokenizer.json").is_file():
        copy_tokenizer(source, folder)
    else:
        tokenizer.save_pretrained(folder)
    own_code.copy(folder)
    if modules or caches:
        _ship_code(code, type(model), _remote_class(task), folder)


def _remote_class(task: Task) -> str:
    """Name of the class that a checkpoint's own code ends in."""
    return "SkipCat" + TASKS[task].auto_class.removeprefix("AutoModel")


def _cast_state(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state in another type; tensors that share memory go on sharing it."""
    done: dict[int, torch.Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        key = tensor.data_ptr()
        if key not in done or done[key].shape != tensor.shape:
            done[key] = cast(name, tensor, dtype)
        state[name] = done[key]
    return state


def _ship_code(
    code: ModuleType, model_class: type[PreTrainedModel], remote: str, folder: Path
) -> None:
    """Copy the loading code, and what it imports, ending in the class that `auto_map` names."""
    for imported in {modeling_quantized, modeling_skipcat} - {code}:
        own = Path(str(imported.__file__))
        (folder / own.name).write_text(own.read_text(encoding="utf-8"), encoding="utf-8")
    path = Path(str(code.__file__))
    source = path.read_text(encoding="utf-8")
    base = model_class.__name__
    module = model_class.__module__
    if module.startswith(REMOTE_MODULES):
        module = "." + module.rpartition(".")[2]  # its own code, which lies beside
    tail = (
        f"\n\nfrom {module} import {base}  # noqa: E402\n\n\n"
        f"class {remote}({base}):\n"
        f'    """{base}; importing this file taught transformers to load its factors."""\n'
    )
    (folder / path.name).write_text(source + tail, encoding="utf-8")


def load_checkpoint(
    folder: Path | str, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a compressed (or plain) checkpoint, refusing one whose tensors do not all match.

    transformers fills tensors that it cannot find with random numbers and goes on; this does not.

    Args:
        folder: a Hugging Face folder.
        dtype: what the weights are held in; by default what they are stored in.
        trust_remote_code: let Python code that comes with the model run.

    Raises:
        InputError: no such folder, broken weights, or tensors missing, superfluous or misshapen,
            or not finite; a kind of model that is not supported.
    """
    folder = Path(folder)
    config, model_class = read_architecture(folder, trust_remote_code=trust_remote_code)
    with explaining("The checkpoint could not be loaded.", folder):
        model, info = model_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to be refused in words of ours
            trust_remote_code=trust_remote_code,
        )
    require_exact(folder, info)
    require_recorded_weights(folder)
    settle_ties(model, folder)
    require_finite_model(model, folder)
    for name, module in model.named_modules():
        if isinstance(module, modeling_quantized.QuantizedWeight):
            require_finite(f"{name}.scales", module.scales.view(torch.float16), folder)
    return model.eval()


def read_architecture(
    folder: Path, *, trust_remote_code: bool = False
) -> tuple[PreTrainedConfig, Any]:
    """The config of a checkpoint, and what makes the model of it, after all checks but of weights.

    Raises:
        InputError: no checkpoint, its own code is not trusted, or not a supported kind of model.
    """
    require_checkpoint(folder)
    silence_transformers()
    know_own_classes()
    with explaining("The checkpoint could not be read.", folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        model_class = _own_class(config, folder) if trust_remote_code else None
        if model_class is None:
            auto_class = TASKS[task_of_folder(folder)].auto_class
            model_class = getattr(transformers, auto_class)
            model = empty_model(auto_class, config, trust_remote_code)
            refuse_other_architectures(model, folder)
    return config, model_class


def require_checkpoint(folder: Path) -> None:
    """Raise InputError when a folder has no config, or no whole safetensors."""
    if not (folder / "config.json").is_file():
        raise InputError(
            "Not a checkpoint folder.", where=folder, expected="a folder that holds config.json"
        )
    check_folder(folder)


def require_exact(folder: Path, info: dict[str, Any]) -> None:
    """Raise InputError when tensors are missing, superfluous or of another shape.

    Args:
        folder: for the message.
        info: `missing_keys`, `unexpected_keys`, `mismatched_keys`, as transformers reports them.
    """
    info = {kind: info.get(kind) or () for kind in _KINDS}
    require_tensors(
        "The checkpoint's tensors are not those its config asks for.",
        folder,
        info,
        change="compress again, or copy the whole folder again",
    )


def weights_record(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of every weight file, as report.json names them."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": known_sha256(path)}
        for path in weight_files(folder)
    }


def require_recorded_weights(folder: Path) -> None:
    """Hold the weights of a checkpoint to its report.json; one of an older version names none.

    A file is read for it once, and again when it was changed.

    Raises:
        InputError: they are other weights, or a copy that broke.
    """
    place = folder / _REPORT
    recorded = json_field(read_record(folder, _REPORT), _WEIGHTS, dict, place, default=None)
    if recorded is None:
        return
    found = weights_record(folder)
    odd = sorted(
        name for name in found.keys() | recorded.keys() if found.get(name) != recorded.get(name)
    )
    if odd:
        raise InputError(
            "The weights are not those that the checkpoint's record was written for.",
            where=folder / odd[0],
            observed=found.get(odd[0], "no such file"),
            expected=recorded.get(odd[0], "no such file"),
            change="copy the whole folder again, or compress again; of weights that were changed "
            f"on purpose take '{_WEIGHTS}' out of {_REPORT}",
        )


def read_record(folder: Path, name: str) -> dict[str, Any]:
    """recipe.json or report.json of a checkpoint; empty for a folder that skipcat did not write.

    Raises:
        InputError: it is no JSON object.
    """
    path = folder / name
    if not path.is_file():
        return {}
    return read_json_object(path, change="copy the whole folder again")
