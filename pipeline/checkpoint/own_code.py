"""Python code that a model came with, and that its checkpoint must carry to be loaded again."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

REMOTE_MODULES = "transformers_modules."
_BASE = "SkipCatBase"
# Files of our own that a checkpoint carries.
_OURS = ("modeling_quantized", "modeling_skipcat", "modeling_cache")


@dataclass(frozen=True)
class OwnCode:
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
    def of(cls, model: PreTrainedModel, source: Path | None) -> OwnCode:
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


def own_class(config: Any, folder: Path) -> Any:
    """The class of a checkpoint that skipcat made of a model with code; runs that code.

    The class that transformers alone would load is made from this one, by modeling_skipcat.py; it
    brings definitions of the factored layers that are not those of this process.
    """
    reference = (getattr(config, "auto_map", None) or {}).get(_BASE)
    return None if reference is None else get_class_from_dynamic_module(reference, folder)
