"""The compressed checkpoint: an ordinary Hugging Face folder, written whole and loaded strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_base import ImageProcessingMixin

from pipeline.artefact import write_json
from pipeline.checkpoint import modeling_skipcat
from pipeline.checkpoint.modeling_skipcat import SkipCatConfig
from pipeline.errors import InputError
from pipeline.json_file import read_json_object
from pipeline.model.source import check_safetensors
from pipeline.model.task import TASKS, Task, task_of_config, task_of_folder

# What weights are stored in, by the names that recipe.json and --dtype give.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# save_pretrained holds one shard in memory a second time.
_LARGEST_SHARD = "2GB"


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | ImageProcessingMixin,
    modules: dict[str, dict[str, Any]],
    folder: Path,
    dtype: torch.dtype,
) -> None:
    """Write config, weights, tokenizer, chat template and the code that loads them.

    Args:
        model: with its factored layers in place.
        tokenizer: saved beside it; of an image classifier, its image processor.
        modules: `quantization_config.modules`; empty when nothing was factored.
        folder: exists.
        dtype: of all floating-point weights on disk.
    """
    config = model.config
    task = task_of_config({"architectures": [type(model).__name__]})
    if modules:
        # Not model.hf_quantizer: with one, save_pretrained ignores the state that it is given.
        config.quantization_config = SkipCatConfig(modules)
        config.auto_map = {TASKS[task].auto_class: f"modeling_skipcat.{_remote_class(task)}"}
    model.save_pretrained(
        folder, state_dict=_cast_state(model, dtype), max_shard_size=_LARGEST_SHARD
    )
    # save_pretrained names the type the weights had in memory.
    saved = read_json_object(folder / "config.json")
    write_json(folder / "config.json", saved | {"dtype": str(dtype).removeprefix("torch.")})
    tokenizer.save_pretrained(folder)
    if modules:
        _ship_code(type(model), _remote_class(task), folder)


def _remote_class(task: Task) -> str:
    """Name of the class that a checkpoint's own code ends in."""
    return "SkipCat" + TASKS[task].auto_class.removeprefix("AutoModel")


def _cast_state(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state in another type; tensors that share memory go on sharing it."""
    cast: dict[int, torch.Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        key = tensor.data_ptr()
        if key not in cast or cast[key].shape != tensor.shape:
            cast[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        state[name] = cast[key]
    return state


def _ship_code(model_class: type[PreTrainedModel], remote: str, folder: Path) -> None:
    """Copy the loading code, ending in the class that `auto_map` names."""
    source = Path(modeling_skipcat.__file__).read_text(encoding="utf-8")
    base = model_class.__name__
    tail = (
        f"\n\nfrom {model_class.__module__} import {base}  # noqa: E402\n\n\n"
        f"class {remote}({base}):\n"
        f'    """{base}; importing this file taught transformers to load its factors."""\n'
    )
    (folder / "modeling_skipcat.py").write_text(source + tail, encoding="utf-8")


def load_checkpoint(folder: Path | str, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a compressed (or plain) checkpoint, refusing one whose tensors do not all match.

    transformers fills tensors that it cannot find with random numbers and goes on; this does not.

    Args:
        folder: a Hugging Face folder.
        dtype: what the weights are held in; by default what they are stored in.

    Raises:
        InputError: no such folder, broken weights, or tensors missing, superfluous or misshapen.
    """
    folder = Path(folder)
    require_checkpoint(folder)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        auto_class = getattr(transformers, TASKS[task_of_folder(folder)].auto_class)
        model, info = auto_class.from_pretrained(
            folder, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True
        )
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            "The checkpoint could not be loaded.", where=folder, observed=first
        ) from error
    require_exact(folder, info)
    return model.eval()


def require_checkpoint(folder: Path) -> None:
    """Raise InputError when a folder has no config, or no whole safetensors."""
    if not (folder / "config.json").is_file():
        raise InputError(
            "Not a checkpoint folder.", where=folder, expected="a folder that holds config.json"
        )
    check_safetensors(folder)


def require_exact(folder: Path, info: dict[str, Any]) -> None:
    """Raise InputError when tensors are missing, superfluous or of another shape.

    Args:
        folder: for the message.
        info: `missing_keys`, `unexpected_keys`, `mismatched_keys`, as transformers reports them.
    """
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in info.get(kind) or ())
        if names:
            raise InputError(
                "The checkpoint's tensors are not those its config asks for.",
                where=folder,
                observed=f"{len(names)} {kind.replace('_', ' ')}: {', '.join(names[:4])}",
                expected="every tensor, and no other",
                change="compress again, or copy the whole folder again",
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
