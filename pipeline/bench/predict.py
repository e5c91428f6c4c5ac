"""What a device that is not here would make of a model: speed, memory, energy, by engine.

    bound:     tokens/s = 1 / max(bytes read for a token / bandwidth, FLOP of rebuilding / peak)
    expected:  seconds  = bytes / (efficiency * bandwidth) + cycles * kernels / clock + FLOP / peak

Efficiency and cycles (what a kernel costs besides the bytes it reads) are an engine's, the same for
every device and model; they are fitted to published figures. Kernels are the matrix products, of
which a factored layer has more, the norms, and three others in a layer. FLOP are those of keys that
a smaller cache has to rebuild at every step, at a peak that no kernel reaches.

Of our engines no figure is published or measured on such a device: they are taken to be between the
other two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.bench.devices import DeviceSpec
from pipeline.bench.fits import DecodeFit, Estimate, MemoryFit, PrefillFit, joules_per_token
from pipeline.bench.judge import judged_figures
from pipeline.bench.published import EDGE_LLM, LLAMA_CPP
from pipeline.bench.targets import BenchTarget
from pipeline.bench.traffic import Traffic
from pipeline.engine.plan import EnginePlan
from pipeline.errors import ResourceError
from pipeline.provenance import provenance
from pipeline.runtime.device.preflight import (
    LARGEST_BUFFER_BYTES,
    LIBRARIES_BYTES,
    REFUSING_L4T,
    SMALL_BOARD_BYTES,
    UPDATE_L4T,
)

OURS = "ours"
_ENGINES = (OURS, EDGE_LLM, LLAMA_CPP)
# Weights of a shape in the type that an engine has instead.
_OWN_TYPES = {
    LLAMA_CPP: {"int4": "q4_k_m", "nvfp4": "q4_k_m", "int8": "q8_0"},
    OURS: {"q4_k_m": "int4", "q8_0": "int8", "nvfp4": "int4"},
    EDGE_LLM: {"q4_k_m": "int4", "q8_0": "int8"},
}
# Plans of ours beside the weights that they hold: docs/engine-size.md, which has seconds, too.
_PLAN_PER_WEIGHT = 1.06
_BUILD_SECONDS_PER_BYTE = 11 / 269e6
# Users report that building takes 3 to 4 times the weights: TensorRT-Edge-LLM, issue 30.
_EDGE_BUILD = (3.5, 3.0, 4.0)
_YES, DOES_NOT_FIT = "fits", "does not fit"
_UNSURE, _NEW_L4T = "may not fit", "needs L4T 36.5"
_TAKE_LESS = (
    "take fewer bits (--dtype int4), a smaller model or a larger device; on a board that lacks "
    "little, `sudo systemctl isolate multi-user.target` stops the desktop, which takes 1 GB (swap "
    "does not help: what a GPU holds is not swapped)"
)


@dataclass(frozen=True)
class _Prediction:
    """What is expected of one model on one device in one engine. No figure of it was measured.

    Attributes:
        device: name.
        engine: whose program runs it.
        counted_as: type of the weights that were counted; None for those of a folder.
        gb_per_s: peak bandwidth of its memory.
        context: tokens in the cache, and of the prompt.
        bytes_per_token: that one step reads, and writes where the cache is copied.
        kernels: that one step is taken to start.
        bound_tokens_per_s: what the bandwidth allows.
        expected_tokens_per_s: what the fit expects.
        tokens_per_s: the same with its interval.
        efficiency: expected over bound.
        prefill_ms: of a prompt as long as the context; None where there is no figure to go by.
        least_prefill_ms: what its operations take at the peak.
        joules_per_token: on the rail of CPU and GPU; None where there is no figure to go by.
        needed_bytes: weights and a cache for the context.
        run_bytes: memory that running takes, with the libraries.
        available_bytes: memory that there is for it.
        fits: whether it does, for certain.
        verdict: the same in words.
        build_peak_bytes: memory that building an engine takes; None where there is none to build.
        least_build_seconds: what it takes on a PC without timing kernels; likewise.
        rebuild_flop: operations that rebuild keys in one step; 0 where none are.
        rebuild_flop_per_byte: of those, for each byte that is not read since keys are latents; what
            the device has for a byte is `flop_per_byte`. None where none are rebuilt.
        flop_per_byte: peak operations over peak bandwidth.
        rebuilding_pays: whether keys as they are would take longer to read; None as above.
    """

    device: str
    engine: str
    counted_as: str | None
    gb_per_s: float
    context: int
    bytes_per_token: int
    kernels: int
    bound_tokens_per_s: float
    expected_tokens_per_s: float
    tokens_per_s: Estimate
    efficiency: float
    prefill_ms: Estimate | None
    least_prefill_ms: float
    joules_per_token: Estimate | None
    needed_bytes: int
    run_bytes: Estimate
    available_bytes: int
    fits: bool
    verdict: str
    build_peak_bytes: Estimate | None
    least_build_seconds: float | None
    rebuild_flop: float
    rebuild_flop_per_byte: float | None
    flop_per_byte: float
    rebuilding_pays: bool | None


def predict(
    targets: Sequence[BenchTarget], devices: Sequence[DeviceSpec], context: int
) -> dict[str, Any]:
    """What is expected of every model on every device; the record says that nothing was measured.

    Raises:
        UsageError: tokens beyond a model's context.
    """
    for target in targets:
        target.require_length(context, 1)
    checked = judged_figures()
    rows = [
        {"model": target.label}
        | target.public_what
        | asdict(_predict_target(target, device, context, engine))
        | {"published_figures": _published_of(checked["published"], device, engine)}
        for target in targets
        for device in devices
        for engine in _ENGINES
    ]
    return {
        "schema": 2,
        "kind": "prediction",
        "measured": False,
        "context": context,
        "provenance": provenance(),
        "devices": [
            asdict(device) | {"gb_per_s": device.gb_per_s, "tflops": device.tflops}
            for device in devices
        ],
        "check": checked,
        "rows": rows,
    }


def require_a_fit(record: dict[str, Any]) -> None:
    """Refuse a prediction of a model that our engine runs on none of the devices.

    Raises:
        ResourceError: there is one; says what it needs, and what would help.
    """
    for model in dict.fromkeys(row["model"] for row in record["rows"]):
        rows = [row for row in record["rows"] if (row["model"], row["engine"]) == (model, OURS)]
        if any(row["verdict"] != DOES_NOT_FIT for row in rows):
            continue
        row = min(rows, key=lambda row: row["run_bytes"]["expected"] - row["available_bytes"])
        needed, available = row["run_bytes"]["expected"] / 1e9, row["available_bytes"] / 1e9
        large = f"at most {available:.1f} GB", _TAKE_LESS
        buffer = f"no buffer above {LARGEST_BUFFER_BYTES / 1e9:.1f} GB, with L4T {REFUSING_L4T}"
        expected, change = large if needed > available else (buffer, UPDATE_L4T)
        raise ResourceError(
            "This model does not run on these devices.",
            where=f"{model} on {row['device']}",
            observed=f"{needed:.1f} GB",
            expected=expected,
            change=change,
        )


def _published_of(published: Sequence[dict[str, Any]], device: DeviceSpec, engine: str) -> str:
    """How many speeds of an engine were published of a device, and the largest error of them."""
    module = device.name.partition("@")[0]
    errors = [
        abs(row["error"])
        for row in published
        if (row["kind"], row["engine"]) == ("decode", engine)
        and module == row["device"].partition("@")[0]
    ]
    return f"{len(errors)}, at most {max(errors):.0%} off" if errors else "none"


def _predict_target(
    target: BenchTarget, device: DeviceSpec, context: int, engine: str
) -> _Prediction:
    """A model in the type of weights that an engine has for it."""
    dtype = target.what.get("dtype")
    own = _OWN_TYPES[engine].get(dtype or "", dtype)
    traffic = target.traffic if own == dtype else target.in_type(str(own))
    return _predict_one(traffic, device, context, engine, own)


def _predict_one(
    traffic: Traffic, device: DeviceSpec, context: int, engine: str, dtype: str | None = None
) -> _Prediction:
    """All that is expected of a model on a device, with `context` tokens in the cache."""
    cache_bytes = traffic.cache_bytes(context)
    passes = traffic.cache_passes if engine == OURS else 1
    read_bytes = traffic.weight_bytes() + passes * cache_bytes
    flop, intensity = traffic.rebuild_flop(context), traffic.rebuild_flop_per_byte
    slowest = max(read_bytes / (device.gb_per_s * 1e9), flop / (device.tflops * 1e12))
    speed = _tokens_per_s(engine, read_bytes, traffic.kernels, device, flop)
    run = _run_bytes(traffic, context, engine)
    verdict = _verdict(run, traffic, device)
    return _Prediction(
        device=device.name,
        engine=engine,
        counted_as=dtype,
        gb_per_s=round(device.gb_per_s, 1),
        context=context,
        bytes_per_token=read_bytes,
        kernels=traffic.kernels,
        bound_tokens_per_s=1 / slowest,
        expected_tokens_per_s=speed.expected,
        tokens_per_s=speed,
        efficiency=speed.expected * slowest,
        prefill_ms=PrefillFit.of_edge_llm().prompt_ms(traffic, context, device)
        if engine == EDGE_LLM and device.is_orin
        else None,
        least_prefill_ms=traffic.prefill_flop(context) / (device.tflops * 1e9),
        joules_per_token=joules_per_token(speed, device) if device.has_power_figures else None,
        needed_bytes=traffic.stored_bytes + cache_bytes,
        run_bytes=run,
        available_bytes=device.available_bytes,
        fits=verdict == _YES,
        verdict=verdict,
        build_peak_bytes=_build_peak(traffic, engine),
        least_build_seconds=_BUILD_SECONDS_PER_BYTE * traffic.stored_bytes
        if engine == OURS
        else None,
        rebuild_flop=flop,
        rebuild_flop_per_byte=intensity,
        flop_per_byte=round(device.flop_per_byte, 1),
        rebuilding_pays=None if intensity is None else intensity <= device.flop_per_byte,
    )


def _tokens_per_s(
    engine: str, read_bytes: int, kernels: int, device: DeviceSpec, flop: float
) -> Estimate:
    """Expected speed; of ours, between those of the other two with the same bytes."""
    if engine == OURS:
        quick, slow = (
            _tokens_per_s(name, read_bytes, kernels, device, flop) for name in (EDGE_LLM, LLAMA_CPP)
        )
        middle = math.sqrt(quick.expected * slow.expected)
        return Estimate(middle, min(quick.low, slow.low), max(quick.high, slow.high))
    fit = DecodeFit.of(engine)
    return Estimate.around(1 / fit.seconds(read_bytes, kernels, device, flop), fit.spread)


def _run_bytes(traffic: Traffic, context: int, engine: str) -> Estimate:
    """Memory that an engine takes; of two of them only the libraries' part is known, of Edge-LLM.

    Ours may take more: `preflight` is given the plan, and takes the most for the libraries.
    """
    if engine == EDGE_LLM:
        return MemoryFit.of_edge_llm().run_bytes(traffic, context)
    cache_bytes = traffic.cache_bytes(context)
    if engine == OURS:
        copies = 1 if traffic.cache_passes == 1 else 2
        own = _PLAN_PER_WEIGHT * traffic.stored_bytes + copies * cache_bytes
    else:
        own = float(traffic.stored_bytes + cache_bytes)
    base = MemoryFit.of_edge_llm().base
    return Estimate(own + base.expected, own + base.low, own + LIBRARIES_BYTES)


def _verdict(run: Estimate, traffic: Traffic, device: DeviceSpec) -> str:
    """Whether a model runs in the memory of a device, in words."""
    if run.expected > device.available_bytes:
        return DOES_NOT_FIT
    refuses = (
        device.is_orin
        and device.memory_gb << 30 <= SMALL_BOARD_BYTES
        and traffic.stored_bytes > LARGEST_BUFFER_BYTES
        and device.l4t in (None, REFUSING_L4T)
    )
    if refuses:
        return _NEW_L4T if device.l4t is None else DOES_NOT_FIT
    return _YES if run.high <= device.available_bytes else _UNSURE


def _build_peak(traffic: Traffic, engine: str) -> Estimate | None:
    """Memory that building an engine takes on the device."""
    if engine == OURS:
        stored = traffic.stored_bytes
        low, high = (float(EnginePlan.peak_bytes(stored, f)) for f in ("shared", "separate"))
        return Estimate(low, low, high)
    if engine == EDGE_LLM:
        return Estimate(*(factor * traffic.stored_bytes for factor in _EDGE_BUILD))
    return None
