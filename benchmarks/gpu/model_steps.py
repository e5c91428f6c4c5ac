"""Steps over whole models: a token of batch 1 after a context, dense and compressed, and rivals.

    dense         float16, torch.compile, the step one CUDA graph; once as it is, once tuned
    skip K        ranks that keep K of the parameters, by our kernels; the rest as of dense
    low-rank K    factors B A of the same ranks
    int4          dense matrices in 4 bits, by our kernels; int4 skip K: ranks too
    transformers  its model under torch.compile with CUDA graphs and a static cache
    session       what `skipcat run --device cuda` runs: not compiled, one captured graph a step

Bytes are those that a step reads: weights, and the cache up to its place.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.decoder import Decoder, Way, graph_of, median_ms
from benchmarks.gpu.layer_steps import TINY
from benchmarks.gpu.steps import Row, Setting, let_go, outcome, verdict
from pipeline.bench.shapes import Shape, fill_randomly_, find_shape

_TUNED = (("coordinate_descent_tuning", True),)
_DENSE, _DENSE_TUNED = Way("dense"), Way("dense, tuned", compiler=_TUNED)
_BOTH, _CODES = Way("int4 skip 0.6", 0.6, "skip", 4), Way("int4", bits=4)
_RANKS = tuple(Way(f"skip {kept}", kept, "skip") for kept in (0.6, 0.8, 0.4))
_PLAIN = Way("low-rank 0.6", 0.6, "low_rank")
# Both dense ones first: others are held against the quicker. Then what decides, if time is short.
_WAYS = (_DENSE, _DENSE_TUNED, _BOTH, _RANKS[0], _CODES, *_RANKS[1:], _PLAIN)
_CONTEXT, _TOKENS = 1024, 64
_ENOUGH_S = 10.0
_SAME = 2e-2  # of logits, captured and one by one: sums in other orders, in half precision
_LEAST_SHARE, _LEAST_OVER_DENSE, _LEAST_OF_BYTES = 0.7, 3.0, 0.9


def decode_8b(setting: Setting) -> Iterator[Row]:
    """The shape of Qwen3-8B: what the targets are about."""
    yield from _decode("qwen3-8b", setting)


def decode_1b(setting: Setting) -> Iterator[Row]:
    """The shape of Llama-3.2-1B."""
    yield from _decode("llama-3.2-1b", setting)


def decode_default(setting: Setting) -> Iterator[Row]:
    """The shape of the default model."""
    yield from _decode("smollm2-135m", setting)


def _decode(name: str, setting: Setting) -> Iterator[Row]:
    """Every way, against the quicker of the dense ones of this run."""
    shape = find_shape(name) if setting.on_gpu else TINY
    dense_ms: list[float] = []
    dense_bytes = 0
    # Of another run, times are another matter: dense is measured again.
    for way in _WAYS:
        if way.name in setting.done - {_DENSE.name} or setting.left_s < _ENOUGH_S:
            continue
        row = _way_row(shape, way, setting)
        let_go()
        if way.form == "dense" and way.bits == 16:
            dense_ms.append(row["ms"])
            dense_bytes = row["read_bytes"]
        else:
            row["over_dense"] = min(dense_ms) / row["ms"]
            row["of_bytes"] = row["over_dense"] / (dense_bytes / row["read_bytes"])
            row["verdicts"] += _verdicts(name, way, row, setting)
        yield way.name, row


def _way_row(shape: Shape, way: Way, setting: Setting) -> dict[str, Any]:
    """One way, timed, its captured logits beside those of the step run once."""
    context, tokens = (_CONTEXT, _TOKENS) if setting.on_gpu else (8, 2)
    multiple = 64 if way.bits == 4 and setting.on_gpu else 16
    started = time.monotonic()
    places = context + tokens + 16
    decoder = Decoder(shape, way, setting.device, places, setting.seed, multiple)
    with torch.inference_mode():
        decoder.place.fill_(context)
        expected = decoder.step().float().clone()
        decoder.compile_("inductor" if setting.on_gpu else "eager")
        decoder.place.fill_(context)
        replay, logits = graph_of(decoder) if setting.on_gpu else (decoder.step, expected)
        decoder.place.fill_(context)
        replay()
        difference = ((logits.float() - expected).norm() / expected.norm()).item()
        made_s = time.monotonic() - started
        times = median_ms(replay, decoder, context, tokens)
    read = decoder.read_bytes(context)
    per_s = read / times[0] * 1e3
    return {
        "kept": way.kept,
        "read_bytes": read,
        "ms": times[0],
        "spread_ms": times[1:],
        "gb_per_s": per_s / 1e9,
        "share": per_s / setting.bytes_per_s,
        "made_s": made_s,
        "difference": difference,
        "says": f"{times[0]:.3f} ms a token, {read / 1e9:.2f} GB",
        "verdicts": [outcome("captured logits are those of the step", difference <= _SAME)],
    }


def _verdicts(
    name: str, way: Way, row: dict[str, Any], setting: Setting
) -> Iterator[dict[str, Any]]:
    """What is asked of a compressed model; at 8B, of ranks and few bits together."""
    if way.form == "skip" and way.bits == 16:
        claim = "over dense, of the bytes' ratio"
        yield verdict(claim, row["of_bytes"], _LEAST_OF_BYTES, setting.on_gpu)
    elif way is _BOTH:
        judged = setting.on_gpu and name == "qwen3-8b"
        yield verdict("share of the copy bandwidth", row["share"], _LEAST_SHARE, judged)
        claim = "over dense float16 with CUDA graphs"
        yield verdict(claim, row["over_dense"], _LEAST_OVER_DENSE, judged)


def sessions(setting: Setting) -> Iterator[Row]:
    """Transformers' own dense model compiled as it is, and our session, on the 1B shape."""
    shape = find_shape("llama-3.2-1b") if setting.on_gpu else TINY
    for name, kept, compiled in (
        ("session, dense", 1.0, False),
        ("session, skip 0.6", 0.6, False),
        ("transformers, dense", 1.0, True),
    ):
        if name not in setting.done and setting.left_s >= _ENOUGH_S:
            row = _session_row(shape, kept, compiled, setting)
            let_go()
            yield name, row


def _session_row(shape: Shape, kept: float, compiled: bool, setting: Setting) -> dict[str, Any]:
    """Milliseconds a token of a session over a model of random weights."""
    from pipeline.kernels.install import use_operator_
    from pipeline.runtime.sessions.static_session import StaticSession

    context, tokens = (_CONTEXT, _TOKENS) if setting.on_gpu else (8, 2)
    model = shape.empty_model(kept)
    fill_randomly_(model, torch.float16 if setting.on_gpu else torch.float32)
    model = model.to(setting.device)
    use_operator_(model)
    session = StaticSession(model, "torch", context + tokens + 1)
    if compiled:
        mode = "reduce-overhead" if setting.on_gpu else None
        backend = "inductor" if setting.on_gpu else "eager"
        compiled_model = torch.compile(model, mode=mode, backend=backend, fullgraph=True)
        # torch.compile's own graphs, in place of the one captured by hand.
        session._step = lambda ids: _compiled_step(session, compiled_model, ids)  # type: ignore[method-assign]
    ids = torch.randint(0, shape.vocab, (1, context + tokens), device=setting.device)
    times = [_session_ms(session, ids, context) for _ in range(4)][1:]
    skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    claim = "torch.compile used CUDA graphs"
    return {
        "kept": kept,
        "ms": statistics.median(times),
        "spread_ms": [min(times), max(times)],
        "says": f"{statistics.median(times):.3f} ms a token",
        "verdicts": [outcome(claim, skips == 0)] if compiled and setting.on_gpu else [],
    }


def _compiled_step(session: Any, model: Any, ids: torch.Tensor) -> torch.Tensor:
    """One token by the compiled model; its next call writes over the logits."""
    session._token.copy_(ids)
    logits: torch.Tensor = model(
        input_ids=session._token, past_key_values=session._cache, use_cache=True
    ).logits
    return logits.clone()


def _session_ms(session: Any, ids: torch.Tensor, context: int) -> float:
    """Milliseconds a token, fed one by one, both on the device."""
    session.reset()
    session.logits(ids[:, :context], last_only=True)
    if ids.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for place in range(context, ids.shape[1]):
        session.logits(ids[:, place : place + 1])
    if ids.is_cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started) / (ids.shape[1] - context)
