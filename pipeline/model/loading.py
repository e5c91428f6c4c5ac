"""What every call of transformers needs: no question asked, errors in our words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import transformers
from accelerate import init_empty_weights
from transformers import PreTrainedModel

from pipeline.errors import InputError, PipelineError, first_line, is_panic, shortage_of
from pipeline.model.weight_files import quantised_elsewhere, quantising_tool
from pipeline.progress import note

# Buffers of older versions, which newer ones compute: nothing of the model is in them.
_OLD_BUFFERS = re.compile(
    r"rotary_emb\.inv_freq$|(^|\.)position_ids$|\.masked_bias$|\.(attn|attention)\.bias$"
    r"|\.num_batches_tracked$"
)
_NEEDS_CODE = "trust_remote_code"


def silence_transformers() -> None:
    """Let transformers show no warnings and no bars: what matters of them is told by us."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def explaining(what: str, where: object, change: str | None = None) -> Iterator[None]:
    """Turn whatever transformers raises inside into an InputError.

    Args:
        what: the sentence that is said.
        where: folder, file or hub id.
        change: what the user can do about it, where nothing better is known.

    Raises:
        InputError: for any error that is not of the pipeline's own, nor of memory.
    """
    try:
        yield
    except (PipelineError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        if _NEEDS_CODE in str(error):
            raise _needs_code(where) from error
        if shortage := shortage_of(error):
            raise shortage from error
        observed = first_line(error)
        raise InputError(what, where=where, observed=observed, change=change) from error


def _needs_code(where: object) -> InputError:
    return InputError(
        "The model comes with Python code of its own, which is not run unasked.",
        where=where,
        observed="auto_map in its config, trust_remote_code not given",
        change="read the model's code, then pass --trust-remote-code if you trust it; run and "
        "serve take the export of such a model",
    )


def empty_model(auto_class: str, config: Any, trust_remote_code: bool) -> PreTrainedModel:
    """A model of a config without numbers, on the meta device."""
    with init_empty_weights():
        return getattr(transformers, auto_class).from_config(
            config, trust_remote_code=trust_remote_code
        )


def require_tensors(
    what: str,
    where: object,
    info: Mapping[str, Iterable[Any]],
    *,
    change: str | None = None,
) -> None:
    """Refuse weights of which tensors are missing, superfluous or of another shape.

    Old buffers that newer versions compute may be there; nothing else is passed over.

    Args:
        what: the sentence that is said.
        where: folder, file or hub id.
        info: `missing_keys`, `unexpected_keys`, `mismatched_keys`, as transformers reports them:
            names, and of the last (name, shape in the file, shape by the config).
        change: what the user can do about it.

    Raises:
        InputError: some are.
    """
    found = {kind: sorted(map(_key_words, names)) for kind, names in info.items()}
    extra = [n for n in found.get("unexpected_keys", ()) if not _OLD_BUFFERS.search(n)]
    if extra and quantising_tool(extra):
        raise quantised_elsewhere(where, extra, extra)
    found["unexpected_keys"] = extra
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = found.get(kind)
        if names:
            raise InputError(
                what,
                where=where,
                observed=f"{len(names)} {kind.replace('_', ' ')}: {', '.join(names[:4])}",
                expected="every tensor of the architecture, and no other",
                change=change,
            )


def _key_words(key: Any) -> str:
    if isinstance(key, str):
        return key
    name, stored, wanted = key
    return f"{name} ({list(stored)} in the file, {list(wanted)} by the config)"


def settle_ties(model: PreTrainedModel, where: object) -> None:
    """Let the config say what transformers has done: it ties no tensors that differ in the file."""
    config, head = model.config, model.get_output_embeddings()
    table = model.get_input_embeddings()
    if head is None or not getattr(config, "tie_word_embeddings", False):
        return
    if head.weight is not table.weight:
        config.tie_word_embeddings = False
        config.get_text_config().tie_word_embeddings = False
        note(f"the head is used that {where} holds, though its config says that it has none")
