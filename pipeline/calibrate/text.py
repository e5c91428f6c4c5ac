"""Where token windows come from: a text file, a hub dataset, or the model itself.

A specification is `self` (text that the model generates), `wikitext2+c4` (hub datasets, mixed half
and half as SkipCat does), the path of a UTF-8 text file, or several of these joined by `+`: a model
calibrated on one kind of text alone does worse on every other.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.artefact import sha256_of_file
from pipeline.calibrate.precision import fast_steps
from pipeline.calibrate.sampled_text import sampled_windows
from pipeline.errors import InputError, MissingPackageError, first_line
from pipeline.provenance import public_name

_HUB_DATASETS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
    "c4": ("allenai/c4", "en", "train"),
}
# Both are streamed; this many documents hold more than enough text for one window.
_DOCUMENTS_PER_WINDOW = 32


@dataclass
class TokenBatch:
    """Token windows with the record of where they came from.

    Attributes:
        tokens: int64 [count, length].
        source: the specification.
        seed: what the choice of windows or the generation started from.
        details: whatever else identifies the source (file hash, dataset names).
    """

    tokens: torch.Tensor
    source: str
    seed: int
    details: dict[str, str] = field(default_factory=dict)

    def spread(self, count: int) -> torch.Tensor:
        """`count` of the windows, evenly spread over them, int64 [count, length]."""
        return self.tokens[_spread(len(self.tokens), count)]

    def apart_from(self, count: int, most: int) -> torch.Tensor:
        """At most `most` of the windows that are not among `spread(count)`, evenly spread.

        Of all windows where there are no others; int64 [n, length].
        """
        others = self.rest_of(count)
        others = others if len(others) else self.tokens
        return others[_spread(len(others), most)]

    def rest_of(self, count: int) -> torch.Tensor:
        """The windows that are not among `spread(count)`, int64 [n, length]; n may be 0."""
        is_apart = torch.ones(len(self.tokens), dtype=torch.bool)
        is_apart[_spread(len(self.tokens), count)] = False
        return self.tokens[is_apart]

    def describe(self) -> dict[str, object]:
        """The entry written into the recipe: source, seed, shape, token count and hash."""
        count, length = self.tokens.shape
        entry = {key: value for key, value in asdict(self).items() if key != "tokens"}
        digest = hashlib.sha256(self.tokens.numpy().astype("<i8").tobytes()).hexdigest()
        return entry | {
            "source": public_name(self.source),
            "windows": count,
            "window_length": length,
            "tokens": count * length,
            "sha256": digest,
        }


def _spread(available: int, count: int) -> torch.Tensor:
    """Places of `count` of so many things, or of all of them, evenly spread, int64."""
    return torch.linspace(0, available - 1, min(count, available)).round().long()


def load_tokens(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    *,
    count: int,
    length: int,
    seed: int,
    sequential: bool = False,
) -> TokenBatch:
    """Take `count` windows of `length` tokens from a source.

    Args:
        spec: `self`, `wikitext2+c4` (or one of the two), a path, or a mixture joined by `+`, of
            which every part gives the same number of windows.
        tokenizer: turns text into tokens.
        model: generates the text for `self`.
        count: number of windows.
        length: tokens in each.
        seed: decides which windows are taken, or what is generated.
        sequential: take the first windows of the text in order, as perplexity protocols do.

    Raises:
        InputError: no such file or dataset, or too little text; says how much is needed.
    """
    parts = _parts_of(spec)
    if len(parts) > 1:
        for part in filter(_is_file, parts):
            _read(Path(part))  # before a part that takes minutes
        shares = [count // len(parts) + (i < count % len(parts)) for i in range(len(parts))]
        take = partial(load_tokens, tokenizer=tokenizer, model=model, length=length, seed=seed)
        batches = [
            take(part, count=share, sequential=sequential)
            for part, share in zip(parts, shares, strict=True)
            if share
        ]
        return _mixed(batches, spec, seed)
    if spec == "self":
        with fast_steps(model) as rounded:
            tokens = sampled_windows(model, tokenizer, count=count, length=length, seed=seed)
        how = "sampled from the model, temperature 1" + ", products in bfloat16" * rounded
        return TokenBatch(tokens, "self", seed, {"text": how})
    if set(spec.split("+")) <= set(_HUB_DATASETS):
        stream, details = _hub_stream(spec, tokenizer, count, length), {"datasets": spec}
    else:
        stream, details = _file_stream(Path(spec), tokenizer)
    tokens = _windows(stream, spec, count, length, seed, sequential)
    if model is not None:
        _require_rows(tokens, tokenizer, model, spec)
    return TokenBatch(tokens, spec, seed, details)


def _require_rows(
    tokens: torch.Tensor, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, spec: str
) -> None:
    """Raise InputError for tokens that the model's embedding has no row for."""
    rows = model.get_input_embeddings().weight.shape[0]
    highest = int(tokens.max())
    if highest >= rows:
        raise InputError(
            "The tokenizer has words that the model has no embedding of.",
            where=spec,
            observed=f"token {highest}, {tokenizer.convert_ids_to_tokens(highest)!r}",
            expected=f"tokens below {rows}",
            change="take that word out of the text, or use the model's own tokenizer",
        )


def _parts_of(spec: str) -> list[str]:
    """The parts of a mixture; hub datasets, which are mixed as they are read, count as one.

    A file whose name holds a `+` is one part.
    """
    if Path(spec).exists() or set(spec.split("+")) <= set(_HUB_DATASETS):
        return [spec]
    return spec.split("+")


def _mixed(batches: list[TokenBatch], spec: str, seed: int) -> TokenBatch:
    """The windows of all parts, spread so that any stretch of them holds every part."""
    places = torch.cat([(torch.arange(len(b.tokens)) + 0.5) / len(b.tokens) for b in batches])
    tokens = torch.cat([batch.tokens for batch in batches])[places.argsort(stable=True)]
    names = [public_name(batch.source) for batch in batches]
    details = {
        f"{name if names.count(name) == 1 else f'{name} ({place})'}: {key}": value
        for place, (name, batch) in enumerate(zip(names, batches, strict=True), 1)
        for key, value in batch.details.items()
    }
    return TokenBatch(tokens, spec, seed, details)


def require_text(spec: str, tokenizer: PreTrainedTokenizerBase, *, count: int, length: int) -> None:
    """Refuse text files that do not hold the windows asked for; other sources are not opened.

    Raises:
        InputError: no such file, or too little text.
    """
    parts = _parts_of(spec)
    for place, part in enumerate(parts):
        if _is_file(part):
            stream, _ = _file_stream(Path(part), tokenizer)
            share = count // len(parts) + (place < count % len(parts))
            _windows(stream, part, share, length, seed=0, sequential=True)


def _windows(
    stream: torch.Tensor, spec: str, count: int, length: int, seed: int, sequential: bool
) -> torch.Tensor:
    """Cut windows that do not overlap, in order or chosen at random."""
    available = stream.numel() // length
    if available < count:
        raise InputError(
            "The text is too short.",
            where=spec,
            observed=f"{stream.numel()} tokens, {available} windows of {length}",
            expected=f"at least {count * length} tokens for {count} windows",
            change="pass a longer text, or ask for fewer or shorter windows",
        )
    windows = stream[: available * length].view(available, length)
    if sequential:
        return windows[:count].clone()
    chosen = np.sort(np.random.default_rng(seed).permutation(available)[:count])
    return windows[torch.from_numpy(chosen)]


def _is_file(part: str) -> bool:
    """Whether a part of a specification can only be a path."""
    return part != "self" and not set(part.split("+")) <= set(_HUB_DATASETS)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            "The text cannot be read.",
            where=path,
            observed=str(error),
            expected="a UTF-8 text file, 'self', or 'wikitext2+c4'",
        ) from error


def _file_stream(
    path: Path, tokenizer: PreTrainedTokenizerBase
) -> tuple[torch.Tensor, dict[str, str]]:
    text = _read(path)
    details = {"file": path.name, "file_sha256": sha256_of_file(path)}
    return _tokenize(text, tokenizer), details


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Token ids of a text, int64 [n], with no special tokens added.

    Words that a word-tokenised corpus masked as `<unk>` are left out: the model never saw the mark.
    """
    text = text.replace(" <unk>", "").replace("<unk>", "")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _hub_stream(
    spec: str, tokenizer: PreTrainedTokenizerBase, count: int, length: int
) -> torch.Tensor:
    """Tokens of hub datasets, an equal share of each, enough for the windows asked for."""
    try:
        import datasets
    except ImportError as error:
        raise MissingPackageError("datasets", "hub", "read a hub dataset") from error
    names = spec.split("+")
    share = -(-count // len(names))
    parts = []
    for name in names:
        repository, subset, split = _HUB_DATASETS[name]
        try:
            rows = datasets.load_dataset(repository, subset, split=split, streaming=True)
            text = "\n\n".join(row["text"] for row in rows.take(share * _DOCUMENTS_PER_WINDOW * 4))
        except Exception as error:
            raise InputError(
                "A hub dataset could not be read.",
                where=repository,
                observed=first_line(error),
                change="check the network, or pass a text file, or 'self'",
            ) from error
        parts.append(_tokenize(text, tokenizer)[: share * length])
    return torch.cat(parts)
