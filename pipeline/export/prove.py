"""Before a graph is written: does what is traced so compute what the model computes?

A shrunk twin of the model (`twin.py`) goes through the same tracer and the same passes, in the
same profile and type. ONNX Runtime runs its graph, call by call, beside transformers. Where the two
part, there is nothing to export.
"""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.checkpoint.modeling_cache import (
    CacheMap,
    SmallCacheConfig,
    attach_cache_maps,
    cache_maps,
)
from pipeline.checkpoint.skeleton import Skeleton
from pipeline.checkpoint.unrounded_latents import unrounded_latents
from pipeline.errors import InputError
from pipeline.export.contract import CPU, FLOAT, FLOAT32, GRAPH_FILE, OPSET24
from pipeline.export.request import ExportRequest
from pipeline.export.rounded_twin import round_twin_, rounded_entries_of
from pipeline.export.twin import make_twin, twin_facts
from pipeline.model.cache_structure import SIDES, cache_structure
from pipeline.model.structure import decoder_structure
from pipeline.model.task import adapter_of, task_of_config
from pipeline.progress import note
from pipeline.provenance import library_versions, sources_sha256
from pipeline.quantize.cache_rounding import CacheRounding
from pipeline.remembered import Remembered

# Side, whether all heads share a latent, bits, whether keys are mapped after they were turned,
# whether both sides of its layer are of one width, and whether errors of codes are fed back.
LatentKind = tuple[str, bool, int | None, bool, bool, bool]
_KEPT = 0.7  # of a side's numbers, as rank; odd where that is, so that bytes are filled up
_SPREAD = 0.3
_CLIP = 0.8  # of codes whose errors are fed back
# Of float32: both sides round every sum, some tens of them one after the other, in other orders.
# What was ever right was right to 3e-6; what was ever wrong was wrong by 0.01 and more.
_TOLERANCE = 1e-4
# Of a cache of codes, rounded alike on both sides: so much of what rounding changes. Where the two
# differ in the last bits, a number between two codes may be rounded either way; a graph that rounds
# in another way, or not at all, is off by all of it.
_SHARE_OF_ROUNDING = 0.25
# Of float16: so many times what transformers itself loses by float16 on the same twin, and at least
# so many units in the last place (2^-11), for a twin that happens to lose nothing.
_TIMES_TRANSFORMERS, _FEWEST_UNITS = 4.0, 8
_UNIT = 2.0**-11
_Write = Callable[[Skeleton, ExportRequest, Path], dict[str, Any]]
# A twin is the same for many models, and several exports of a build are of one.
_PROOFS, _PROVEN_AT = Remembered("proofs.json"), "proven_at"


def _latent_kinds(config: PreTrainedConfig) -> list[LatentKind]:
    """The kinds of maps that a checkpoint has, the most frequent first; none of another."""
    quantization = getattr(config, "quantization_config", None)
    fields = (
        quantization if isinstance(quantization, dict) else getattr(quantization, "__dict__", {})
    )
    entries: dict[str, dict[str, Any]] = fields.get("caches") or {}
    ranks: dict[str, set[int]] = {}
    for source, entry in entries.items():
        ranks.setdefault(source.rpartition(".")[0], set()).add(entry["rank"])
    found = Counter(
        (
            entry["side"],
            entry["groups"] == 1,
            entry["bits"],
            entry.get("after_rotation", False),
            len(ranks[source.rpartition(".")[0]]) == 1,
            entry.get("error_feedback", False),
        )
        for source, entry in entries.items()
    )
    return [kind for kind, _ in sorted(found.items(), key=lambda item: (-item[1], str(item[0])))]


def _map_twin(model: PreTrainedModel, kinds: list[LatentKind], dtype: torch.dtype) -> None:
    """Give a twin maps of these kinds, in place, and its config their entries.

    Args:
        model: in float32.
        kinds: as above, at least one.
        dtype: whose numbers the maps' are.
    """
    entries: dict[str, dict[str, Any]] = {}
    for number, side in enumerate(cache_structure(model, decoder_structure(model))):
        own = [kind for kind in kinds if kind[0] == side.side]
        if own:
            _, shared, bits, narrow, even, fed = own[number // len(SIDES) % len(own)]
            groups = 1 if shared and not narrow else side.heads
            rank = max(1, round(_KEPT * side.numbers / groups)) | 1
            rank = max(1, rank - 2) if side.side == "value" and not even else rank
            is_narrow = narrow and side.is_rotated
            entries[side.source] = {
                "side": side.side, "heads": side.heads, "width": side.width, "groups": groups,
                "rank": min(rank, side.numbers // groups), "bits": bits,
                "is_rotated": side.is_rotated and not is_narrow, "after_rotation": is_narrow,
                "clip": _CLIP if fed else 1.0, "error_feedback": fed,
            }  # fmt: skip
    attach_cache_maps(model, entries)
    model.config.quantization_config = SmallCacheConfig({}, caches=entries)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for made in cache_maps(model).values():
            made.up.copy_(torch.linalg.qr(torch.randn_like(made.up)).Q)
            made.down.copy_(made.up.transpose(1, 2))
            made.mean.copy_(_SPREAD * torch.randn_like(made.mean))
            if made.feedback is not None:
                _feed_back(made, made.feedback)
            for parameter in made.parameters():
                parameter.copy_(parameter.to(dtype))


def _feed_back(made: CacheMap, feedback: torch.Tensor) -> None:
    """Let the first half of a map's numbers lie, for the most part, where the others do.

    An error of the first can then be undone, and one that is not is seen.
    """
    half = feedback.shape[-1]
    feedback.copy_(torch.randn_like(feedback) / half**0.5)
    first, second = made.up.split([half, made.rank - half], dim=-1)
    made.down[:, :half] *= 2
    made.down[:, half:] -= feedback @ made.down[:, :half]
    made.up[..., :half] = first / 2 + second @ feedback


@dataclass(frozen=True)
class Call:
    """One call of the model in a sequence of calls.

    Attributes:
        what: of the call, for messages: what was read behind how much.
        logits: float32 [B, S, V] or [B, classes].
        first: tokens before it; 0 of an image.
    """

    what: str
    logits: np.ndarray
    first: int = 0


class _Prover(Protocol):
    """What a task knows of running its models; `calls` of both sides correspond."""

    longest: int

    def require(self, config: PreTrainedConfig) -> None:
        """Ask for what can be asked for.

        Raises:
            InputError: the tracer assumes what does not hold for this model.
        """

    def rounding_of(self, model: PreTrainedModel, length: int) -> CacheRounding:
        """Scales for a cache of codes that reads what the calls read."""
        ...

    def calls_of_model(
        self, model: PreTrainedModel, length: int, rounding: CacheRounding | None = None
    ) -> list[Call]:
        """Those of transformers, in float32 whatever it computes in, with its cache rounded so."""
        ...

    def calls_of_graph(self, session: Any, model: PreTrainedModel, length: int) -> list[Call]:
        """ONNX Runtime's of the same inputs."""
        ...


@dataclass(frozen=True)
class _Proof:
    """What `export.json` says of the twin.

    Attributes:
        twin: the class it is of.
        profile: of the graph.
        dtype: of the graph.
        tokens: most tokens that were in the cache; 0 of an image classifier.
        calls: that were compared.
        relative_error: the largest difference of logits, in parts of the largest logit.
        tolerance: the most that it may be.
        seconds: that it took.
    """

    twin: str
    profile: str
    dtype: str
    tokens: int
    calls: int
    relative_error: float
    tolerance: float
    seconds: float


def prove(config: PreTrainedConfig, request: ExportRequest, write: _Write) -> dict[str, Any]:
    """Prove the graph that a request makes of a model, by a twin of the model.

    Args:
        config: of the model.
        request: profile, type, cache length.
        write: traces a skeleton and writes the graph into a folder, as for the model itself;
            returns its record.

    Returns:
        The proof as `export.json` has it; why there is none, where ONNX Runtime is not installed.

    Raises:
        InputError: the twin's graph is not what the twin is, or cannot be made.
    """
    prover: _Prover = adapter_of(task_of_config(config), "prove")
    prover.require(config)
    if find_spec("onnxruntime") is None:
        note("the graph is not proven: onnxruntime is not installed")
        return {"missing": "onnxruntime is not installed"}
    length = min(request.max_length, prover.longest)
    wanted = ExportRequest(request.profile, request.dtype, length, FLOAT, cache=request.cache)
    smallest, whole = _keys(config, wanted)
    known = _PROOFS.get(smallest) or _PROOFS.get(whole)
    if isinstance(known, dict) and known.keys() == {*_Proof.__annotations__, _PROVEN_AT}:
        return known
    proof, is_smallest = _prove(config, wanted, write, prover)
    record = {**asdict(proof), _PROVEN_AT: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    kept = _PROOFS.set_first(smallest if is_smallest else whole, record)
    return kept if isinstance(kept, dict) else record


def _keys(config: PreTrainedConfig, request: ExportRequest) -> tuple[str, str]:
    """By which a proof is found again: alike for models of the same smallest twin, and of this.

    The code that traced, wrote and ran the graph is part of what was proven.
    """
    kinds = [_latent_kinds(config), rounded_entries_of(config)]
    tools = [sources_sha256(), library_versions(), platform.machine()]
    smallest, whole = (
        hashlib.sha256(
            json.dumps([*facts, asdict(request), tools], default=str, sort_keys=True).encode()
        ).hexdigest()
        for facts in ([*found, *kinds] for found in twin_facts(config))
    )
    return smallest, whole


def _prove(
    config: PreTrainedConfig, request: ExportRequest, write: _Write, prover: _Prover
) -> tuple[_Proof, bool]:
    """The proof, and whether it is of the smallest twin that there is."""
    started = time.monotonic()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    dtype = getattr(torch, request.dtype)
    twin = make_twin(config, dtype, lambda m: prover.calls_of_model(m, request.max_length))
    if kinds := _latent_kinds(config):
        _map_twin(twin.model, kinds, dtype)
    rounded = rounded_entries_of(config)
    plain = None
    if rounded:
        plain = prover.calls_of_model(twin.model, request.max_length)
        round_twin_(
            twin.model, rounded, lambda model: prover.calls_of_model(model, request.max_length)
        )
    with tempfile.TemporaryDirectory(prefix="skipcat-twin-") as name:
        folder, graph = Path(name, "twin"), Path(name, "onnx")
        graph.mkdir()
        twin.model.save_pretrained(folder)
        skeleton = _skeleton(folder, dtype, twin.of)
        rounding = None
        if request.cache != FLOAT:
            rounding = prover.rounding_of(twin.model, request.max_length)
            request = replace(request, rounding=rounding)
        record = write(skeleton, request, graph)
        length = record.get("max_length", 0)
        session = _open(graph, request, as_written=bool(rounded))
        actual = prover.calls_of_graph(session, twin.model, length)
    expected = prover.calls_of_model(twin.model, length, rounding)
    tolerance = _TOLERANCE
    if plain is not None:
        tolerance = _rounded_tolerance(twin.model, _differences(expected, plain))
    unrounded = prover.calls_of_model(twin.model, length) if rounding is not None else None
    if any(made.bits for made in cache_maps(twin.model).values()):
        with unrounded_latents(twin.model):
            unrounded = prover.calls_of_model(twin.model, length)
    if unrounded is not None:
        tolerance = max(_TOLERANCE, _SHARE_OF_ROUNDING * max(_differences(expected, unrounded)))
    if request.dtype != FLOAT32:
        own = prover.calls_of_model(twin.model.to(dtype), length)
        lost = max(_differences(own, expected))
        tolerance = max(_TIMES_TRANSFORMERS * lost, _FEWEST_UNITS * _UNIT)
    differences = _differences(actual, expected)
    _require_equal(actual, differences, tolerance, twin.of, request)
    proof = _Proof(
        twin.of,
        request.profile,
        request.dtype,
        length,
        len(actual),
        max(differences),
        tolerance,
        round(time.monotonic() - started, 2),
    )
    return proof, twin.is_smallest


def _rounded_tolerance(model: PreTrainedModel, rounding: list[float]) -> float:
    """How far a graph may be from a twin of rounded convolutions.

    Sums of its whole numbers are exact, so that it gives the same bits, but for convolutions that
    stay as they are: behind one of these a number between two codes may be rounded either way.

    Args:
        model: the twin.
        rounding: what rounding changes.
    """
    mixed = any(isinstance(module, nn.Conv2d) for module in model.modules())
    return max(_TOLERANCE, _SHARE_OF_ROUNDING * max(rounding)) if mixed else 0.0


def _skeleton(folder: Path, dtype: torch.dtype, of: str) -> Skeleton:
    """The twin as the tracer takes it; a refusal names the class, not the twin's folder."""
    try:
        return Skeleton.load(folder, dtype)
    except InputError as error:
        error.details["where"] = of
        raise


def _open(folder: Path, request: ExportRequest, as_written: bool) -> Any:
    """The graph in ONNX Runtime, as the sessions of `pipeline.runtime` open it.

    Args:
        folder: of the graph.
        request: for messages.
        as_written: nodes run as they are written; integer kernels round ties their own way.

    Raises:
        InputError: ONNX Runtime does not take it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(
            str(folder / GRAPH_FILE), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime's exceptions share no base class but this one
        raise InputError(
            "ONNX Runtime does not take the graph that this model becomes.",
            where=f"--profile {request.profile}, {request.dtype}",
            change="run again with -v to see ONNX Runtime's own words",
        ) from error


def _differences(actual: list[Call], expected: list[Call]) -> list[float]:
    """Of each call, the largest difference in parts of the largest logit there is."""
    scale = max(float(np.abs(call.logits).max()) for call in expected)
    pairs = zip(actual, expected, strict=True)
    return [float(np.abs(a.logits - e.logits).max() / scale) for a, e in pairs]


def _require_equal(
    calls: list[Call], differences: list[float], tolerance: float, of: str, request: ExportRequest
) -> None:
    """Raise InputError that names the first call, and its length, that is not what it should be."""
    # A NaN is no smaller than anything.
    wrong = [call for call, error in zip(calls, differences, strict=True) if not error <= tolerance]
    if not wrong:
        return
    worst = max(differences, key=lambda error: np.inf if np.isnan(error) else error)
    change = None
    if request.profile == CPU:
        change = f"export with --profile {OPSET24}; it may hold there"
    raise InputError(
        "The graph would not compute what the model computes, so it is not exported.",
        where=f"{of}, --profile {request.profile}, {request.dtype}",
        observed=f"from length {wrong[0].first + 1} on ({wrong[0].what}), a small twin of the "
        f"model gives logits off by {worst:.2g} of the largest",
        expected=f"at most {tolerance:.1g}, as transformers computes them",
        change=change,
    )
