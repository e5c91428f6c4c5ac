"""A model to be tested, by whatever name: its session, its tokenizer and what ends its answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UsageError
from pipeline.export.contract import RECORD_FILE
from pipeline.runtime.sessions.open_session import open_session
from pipeline.runtime.sessions.session import Session
from pipeline.runtime.tokenizer import load_whole_tokenizer, stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Subject:
    """What is tested."""

    session: Session
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]


def open_subject(
    name: str, backend: str = "auto", *, threads: int | None = None, trust_remote_code: bool = False
) -> Subject:
    """Open an ONNX export, a checkpoint folder, or a model by alias, hub id or GGUF file.

    Args:
        name: folder or name; what runs in PyTorch runs in float32.
        backend: `auto`, `torch` or `onnx`.
        threads: of ONNX Runtime within one operator.
        trust_remote_code: let the model's own Python code run.

    Raises:
        InputError: nothing of that name, or it does not load.
        UsageError: the backend cannot read it.
    """
    folder = Path(name).expanduser()
    # skipcat's own checkpoints need no code but skipcat's, and `load_model` takes none of them.
    needs_code = trust_remote_code and not (folder / "recipe.json").is_file()
    is_checkpoint = (folder / "config.json").is_file() and not needs_code
    if is_checkpoint or (folder / RECORD_FILE).is_file():
        tokenizer = load_whole_tokenizer(folder)
        session = open_session(folder, backend, threads)
        return Subject(session, tokenizer, stop_token_ids(tokenizer, folder))
    if backend == "onnx":
        raise UsageError(
            "The backend 'onnx' reads exported folders only.",
            where=name,
            change="export the model first, or pass --backend torch",
        )
    return _open_named(name, trust_remote_code)


def _open_named(name: str, trust_remote_code: bool) -> Subject:
    """Anything that `pipeline.model.load` takes, in float32."""
    from pipeline.model.load import load_model
    from pipeline.runtime.sessions.torch_session import TorchSession

    loaded = load_model(name, trust_remote_code=trust_remote_code)
    listed = loaded.model.generation_config.eos_token_id
    ids = {loaded.tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
    stop_ids = frozenset(token for token in ids if token is not None)
    return Subject(TorchSession(loaded.model, "torch float32"), loaded.tokenizer, stop_ids)
