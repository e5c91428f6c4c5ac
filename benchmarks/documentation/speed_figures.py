"""Figures of speed, memory and disk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.documentation.markdown import Figure, bold, megabytes, only_row, percent, table

_Json = dict[str, Any]
DECODE = "decode_after_128_tokens_per_s"
PREFILL = "prefill_512_tokens_per_s"
OFFSET = "ours cpu-int4-offset"
_GENAI = "onnxruntime-genai 0.18, its builder's int4"
# Engine of the JSON -> label; what is in bold has the dense model's perplexity.
_SPEED_ENGINES = {
    OFFSET: "**ours, `--profile cpu`** (4 bits with offsets: exact here)",
    "ours cpu-int8": "ours, `--weights int8`",
    "ours cpu-int4": "ours, `--weights int4`",
    "llama.cpp": "llama.cpp through node-llama-cpp, Q4_1",
    "genai genai": "onnxruntime-genai, its builder's int4",
}
_AVX2_ENGINES = {
    "ours cpu-offset": "**ours, int4-offset**, which `--profile cpu` takes here",
    "ours cpu-int8": "**ours, int8**",
    "ours onnx-cpu": "ours, searched bits, 72.6 MB",
    "ours cpu-int4": "ours, int4",
    "genai genai": _GENAI,
    "llama.cpp": "llama.cpp, Q4_1",
}
# By the run of the AVX2 table: only what it calls the first one is another folder's name.
_WIDE_ENGINES = {
    OFFSET: "ours cpu-offset",
    **{name: name for name in ("ours cpu-int8", "ours cpu-int4", "genai genai", "llama.cpp")},
}
KEPT = "ours cpu-int8-kept0.8"
_FIRST_ENGINES = {
    "ours smol-int8": "**ours, int8**",
    "ours smol-int4": "**ours, int4**",
    "genai genai-default": _GENAI,
    "llama.cpp": "llama.cpp (node-llama-cpp 3.22), Q4_1",
}
_LOOKUP_FOLDERS = {"cpu-offset": "int4-offset", "cpu-int8": "int8", "cpu-int4": "int4"}
_LOOKUP_PROMPTS = {
    "text": "an article, to go on with",
    "ask": "questions, in chat",
    "edit": "rewrite, shorten, quote a passage",
}
MEMORY_FOLDERS = {
    "cpu-int4": "SmolLM2-135M, int4",
    "cpu-offset": "SmolLM2-135M, int4-offset",
    "cpu-int8": "SmolLM2-135M, int8",
    "fp32": "SmolLM2-135M, float32",
    "360m-int4": "360M, int4",
    "360m-int8": "360M, int8",
    "1b-int4": "1B, int4",
    "1b-int8": "1B, int8",
}
MEMORY_TARGET = 1.3
_LOADS = {
    "server_load": "tiny random model, float32",
    "server_load_int8": "SmolLM2-135M, `cpu` int8, 8 slots, before prompts were cut alike",
    "server_load_int4_offset": "SmolLM2-135M, `cpu` int4-offset, 8 slots, AVX2 alone",
}
_SESSIONS = {
    "torch float32": "PyTorch, float32",
    "onnxruntime opset24 float32": "ONNX Runtime, `opset24`, float32",
    "onnxruntime cpu int8": "ONNX Runtime, `cpu`, int8",
}
_WITHOUT_TARGET = ("wall, s", "plan / weights", "cpu per layer, s")
# Ratios in the prose: file, ours, other, key, digits.
_RATIOS = {
    "generation/llama-decode": ("generation", "ours smol-int8", "llama.cpp", DECODE, 1),
    "generation/llama-prefill": ("generation", "ours smol-int8", "llama.cpp", PREFILL, 1),
    "generation/llama-single": (
        "generation",
        "ours smol-int8",
        "llama.cpp",
        "decode_after_128_single_token_median",
        2,
    ),
    "generation/genai-int8": ("generation", "ours smol-int8", "genai genai-default", DECODE, 2),
    "generation/genai-int4": ("generation", "ours smol-int4", "genai genai-default", DECODE, 2),
    "avx2/llama-lookup": ("generation_avx2", "ours cpu-offset, lookup", "llama.cpp", DECODE, 1),
    "avx2/llama-decode": ("generation_avx2", "ours cpu-offset", "llama.cpp", DECODE, 2),
    "avx2/llama-prefill": ("generation_avx2", "ours cpu-offset", "llama.cpp", PREFILL, 1),
    "avx2/both-lookup": (
        "generation_avx2",
        "ours cpu-offset, lookup",
        "llama.cpp, lookup",
        DECODE,
        1,
    ),
    "avx2/genai-lookup": ("generation_avx2", "ours cpu-offset, lookup", "genai genai", DECODE, 2),
    "avx2/genai-prefill": ("generation_avx2", "ours cpu-offset", "genai genai", PREFILL, 2),
    "avx2/genai-searched": ("generation_avx2", "ours onnx-cpu, lookup", "genai genai", DECODE, 2),
    **{
        f"avx512/{threads}-{rival}-{what}": (file, OFFSET, engine, key, 2)
        for threads, file in (("two", "generation_avx512"), ("one", "generation_avx512_one"))
        for rival, engine in (("llama", "llama.cpp"), ("genai", "genai genai"))
        for what, key in (("decode", DECODE), ("prefill", PREFILL))
    },
    "avx512/again-genai-decode": ("generation_avx512_again", OFFSET, "genai genai", DECODE, 2),
    "avx512/two-llama-single": (
        "generation_avx512",
        OFFSET,
        "llama.cpp",
        "decode_after_128_single_token_median",
        2,
    ),
    "avx2/searched-float32": ("generation_avx2_float32", "ours onnx-cpu", "ours fp32", DECODE, 1),
}


def _speed(found: _Json) -> list[str]:
    """The engines of one run, shortly."""
    rows = []
    for engine, label in _SPEED_ENGINES.items():
        row = only_row(found["rows"], engine=engine)
        best = engine == OFFSET
        drafted = _with_lookup(found, engine, best)
        rows.append(
            [
                label,
                bold(f"{row['perplexity']:.2f}", best),
                bold(f"{row[PREFILL]:,.0f}", best),
                bold(f"{row[DECODE]:.0f}", best),
                drafted + (", its own" if engine == "llama.cpp" else ""),
            ]
        )
    headings = ("engine", "perplexity", "prefill of 512, tokens/s", "decode, tokens/s")
    return table((*headings, "with prompt lookup"), rows)


def _with_lookup(found: _Json, engine: str, best: bool) -> str:
    """Tokens/s of the same engine with prompt-lookup decoding; empty where it has none."""
    rows = [row for row in found["rows"] if row["engine"] == f"{engine}, lookup"]
    return bold(f"{rows[0][DECODE]:.0f}", best) if rows else ""


def _first_run(found: _Json) -> list[str]:
    """The engines of the first run."""
    rows = [
        [
            *_engine_cells(found, engine, label, engine == "ours smol-int8"),
            f"{only_row(found['rows'], engine=engine)['decode_after_512_tokens_per_s']:.0f}",
            *_cold_and_memory(found, engine),
        ]
        for engine, label in _FIRST_ENGINES.items()
    ]
    headings = ("engine", "perplexity", "prefill of 512, tokens/s", "decode after 128", "after 512")
    return table((*headings, "first token, cold", "MB at 2,048"), rows)


def _avx2_run(found: _Json) -> list[str]:
    """The engines of the second run, with prompt lookup and without."""
    rows = []
    for engine, label in _AVX2_ENGINES.items():
        drafted = _with_lookup(found, engine, engine == "ours cpu-offset")
        rows.append(
            [
                *_engine_cells(found, engine, label, label.startswith("**")),
                drafted + (" (its own)" if engine == "llama.cpp" else ""),
                *_cold_and_memory(found, engine),
            ]
        )
    headings = ("engine, AVX2", "perplexity", "prefill of 512, tokens/s", "decode")
    return table((*headings, "with prompt lookup", "first token, cold", "MB at 2,048"), rows)


def _wide_runs(two: _Json, one: _Json) -> list[str]:
    """The same engines by one thread and by two, on a CPU with wide instructions."""
    rows = []
    labels = {engine: _AVX2_ENGINES[known] for engine, known in _WIDE_ENGINES.items()}
    labels[KEPT] = "ours, int8, 0.8 of the parameters kept (`make engine`)"
    for engine, label in labels.items():
        of = [only_row(found["rows"], engine=engine) for found in (one, two)]
        speeds = [f"{row[key]:,.0f}" for row in of for key in (PREFILL, DECODE)]
        perplexity = bold(f"{of[1]['perplexity']:.2f}", label.startswith("**"))
        drafted = _with_lookup(two, engine, engine == OFFSET)
        drafted += " (its own)" if engine == "llama.cpp" else ""
        rows.append([label, perplexity, *speeds, drafted, *_cold_and_memory(two, engine)])
    threads = [f"{what}, {n}" for n in ("1 thread", "2 threads") for what in ("prefill", "decode")]
    headings = ("engine, AVX-512 and VNNI", "perplexity", *threads, "decode, prompt lookup")
    return table((*headings, "first token, cold", "MB at 2,048"), rows)


def _engine_cells(found: _Json, engine: str, label: str, best: bool) -> list[str]:
    """Label, perplexity, prefill and decode; llama.cpp's tokens come in two speeds."""
    row = only_row(found["rows"], engine=engine)
    single = row["decode_after_128_single_token_median"]
    note = f" ({single:.0f} by the median token)" if engine == "llama.cpp" else ""
    perplexity = bold(f"{row['perplexity']:.2f}", best)
    return [label, perplexity, f"{row[PREFILL]:,.0f}", f"{row[DECODE]:.0f}{note}"]


def _cold_and_memory(found: _Json, engine: str) -> list[str]:
    row = only_row(found["rows"], engine=engine)
    return [f"{row['cold_first_token_s']:.2f} s", megabytes(row["peak_bytes_at_2048"])]


def _lookup(found: _Json) -> list[str]:
    """Both ways over the three kinds of prompts."""
    rows = []
    for kind, label in _LOOKUP_PROMPTS.items():
        cells = [label]
        for folder in _LOOKUP_FOLDERS:
            of = only_row(found["rows"], folder=folder)["kinds"][kind]
            both = f"{of['plain_tokens_per_s']:.1f} → {of['lookup_tokens_per_s']:.1f}"
            cells += [f"{both}, **{of['ratio']:.2f} x**", f"{of['taken']} of {of['drafted']}"]
        rows.append(cells)
    headings = [part for label in _LOOKUP_FOLDERS.values() for part in (label, "")]
    return table(("prompts", *headings), rows)


def _lookup_answers(found: _Json) -> list[str]:
    same = [of["same_answers"] for row in found["rows"] for of in row["kinds"].values()]
    return [f"{min(same)} to {max(same)}"]


def _row_costs(found: _Json) -> list[str]:
    costs = [cost for row in found["rows"] for cost in row["row_costs"].values()]
    return [f"{min(costs):.2f} to {max(costs):.2f}"]


def _rounded_cache(integer: _Json, exact: _Json) -> list[str]:
    """A cache of codes beside one of floats, with both kinds of products."""
    rows = []
    for label, found in (("integer", integer), ("float", exact)):
        quality, decode = found["quality"], found["decode"]
        perplexities = quality["perplexity"]
        rows.append(
            [
                label,
                f"{perplexities['float']:.3f} → {perplexities['int8']:.3f}",
                f"{100 * (quality['ratio'] - 1):+.2f}%",
                f"{quality['kl']:.4f}",
                f"{quality['kl_last_quarter']:.4f}",
                *(f"{decode[context]['faster']:.2f} x" for context in ("128", "4096")),
            ]
        )
    headings = ("`--products`", "perplexity", "", "KL", "last quarter", "after 128", "after 4,096")
    return table(headings, rows)


def _cpu_memory(found: _Json) -> list[str]:
    """Peak against weights and cache."""
    rows = []
    for folder, label in MEMORY_FOLDERS.items():
        row = only_row(found["rows"], folder=folder)
        parts = f"{megabytes(row['weight_bytes'])} + {megabytes(row['cache_bytes'])}"
        ratio = bold(f"{row['ratio']:.2f}", row["ratio"] <= MEMORY_TARGET)
        rows.append([label, parts, megabytes(row["peak_bytes"]), ratio])
    return table(("", "weights + cache, MB", "peak, MB", "/ (weights + cache)"), rows)


def _default_model(found: _Json) -> list[str]:
    """`skipcat bench` of the default model."""
    rows = []
    for row in found["rows"]:
        decode = row["decode_tokens_per_s"]
        rows.append(
            [
                "dense" if row["model"].partition("/")[2].startswith("dense") else "0.8 kept",
                _SESSIONS[row["session"]],
                f"{row['prefill_tokens_per_s']['median']:.0f}",
                f"{decode['median']:.1f} ({decode['min']:.1f} to {decode['max']:.1f})",
                megabytes(row["bytes_per_token"]),
                f"{row['bytes_per_s'] / 1e9:.1f}",
                percent(row["bandwidth_share"], 0),
                megabytes(row["peak_bytes"]),
            ]
        )
    headings = ("model", "session", "prefill, tokens/s", "decode, tokens/s", "MB a token", "GB/s")
    return table((*headings, "of the memory's", "peak MB"), rows, left=2)


def _bandwidth(found: _Json) -> list[str]:
    speed = {key: value / 1e9 for key, value in found["bandwidth"]["bytes_per_s"].items()
             if key != "all"}  # fmt: skip
    return [f"{speed['median']:.1f} GB/s here ({speed['min']:.1f} to {speed['max']:.1f})"]


def _predictions(found: _Json) -> list[str]:
    """Errors of predictions, by group of published figures."""
    rows = []
    for one in found["verdicts"]:
        asked = "" if one["asked"] is None else percent(one["asked"], 0)
        rows.append(
            [
                one["group"],
                str(one["figures"]),
                percent(one["median_error"], 0),
                percent(one["worst_error"], 0) + (", missed" if one["met"] is False else ""),
                asked,
                percent(one["inside_share"], 0),
            ]
        )
    headings = ("published figures", "how many", "median error", "worst", "asked: at most")
    return table((*headings, "in the 80% interval"), rows)


def _server_load(*found: _Json) -> list[str]:
    """What became of all requests, and of the memory."""
    rows = []
    for run, label in zip(found, _LOADS.values(), strict=True):
        memory = run["memory"]
        gigabytes = memory["quarter_means_mib"][-1] * 2**20 / 1e9
        rows.append(
            [
                label,
                f"{run['answered']} of {run['good']}",
                f"{run['equal_to_alone']}",
                f"{run['crossed']}",
                f"{run['bad_with_their_4xx']} of {run['bad']}",
                f"{memory['growth']:+.2%} ({gigabytes:.1f} GB)",
            ]
        )
    headings = ("", "answered", "as alone", "crossed", "bad ones with their 4xx")
    return table((*headings, "memory, 2nd to last quarter"), rows)


def _load_rate(found: _Json) -> list[str]:
    return [f"{found['seconds']:.0f} s: {found['requests_per_s']} requests a second"]


def _stages(found: _Json) -> list[str]:
    """Every figure of a stage that has a target, and some that have none."""
    rows = []
    for name, row in found["rows"].items():
        load = " to ".join(f"{value:.1f}" for value in row["cost"]["load_average"])
        shown = [
            figure
            for figure in row["figures"]
            if figure["target"] is not None or figure["what"].startswith(_WITHOUT_TARGET)
        ]
        for figure in shown:
            target = figure["target"]
            limit = "" if target is None else f"{target:.4g}"
            cells = [f"{figure['value']:.3g}", limit, figure["verdict"].replace("FAIL", "missed")]
            rows.append([name, figure["what"], *cells, load])
    return table(("row", "what", "measured", "at most", "verdict", "load"), rows, left=2)


def _ratio(ours: str, other: str, key: str, digits: int, found: _Json) -> list[str]:
    one, two = (only_row(found["rows"], engine=name)[key] for name in (ours, other))
    return [f"{one / two:.{digits}f}"]


def _slowest(found: _Json) -> list[str]:
    """The slowest repetition with prompt lookup, over llama.cpp's median."""
    ours = only_row(found["rows"], engine="ours cpu-offset, lookup")["all_decode_128"]
    return [f"{min(ours) / only_row(found['rows'], engine='llama.cpp')[DECODE]:.1f}"]


def _float32(found: _Json) -> list[str]:
    searched, plain = (
        only_row(found["rows"], engine=name)[DECODE] for name in ("ours onnx-cpu", "ours fp32")
    )
    return [f"{searched:.1f} against {plain:.1f} tokens/s: {searched / plain:.2f} x"]


def _ratio_figure(file: str, *of: Any) -> Figure:
    lines: Callable[..., list[str]] = partial(_ratio, *of)
    return Figure((file,), lines)


SPEED_FIGURES = {
    "speed": Figure(("generation_avx512",), _speed),
    "generation": Figure(("generation",), _first_run),
    "avx2": Figure(("generation_avx2",), _avx2_run),
    "avx512": Figure(("generation_avx512", "generation_avx512_one"), _wide_runs),
    "avx2/slowest": Figure(("generation_avx2",), _slowest),
    "avx2/float32": Figure(("generation_avx2_float32",), _float32),
    **{name: _ratio_figure(*of) for name, of in _RATIOS.items()},
    "lookup": Figure(("lookup",), _lookup),
    "lookup/same-answers": Figure(("lookup",), _lookup_answers),
    "lookup/row-costs": Figure(("lookup",), _row_costs),
    "rounded-cache": Figure(("rounded_cache", "rounded_cache_float"), _rounded_cache),
    "cpu-memory": Figure(("cpu_memory",), _cpu_memory),
    "default-model": Figure(("bench_default",), _default_model),
    "default-model/bandwidth": Figure(("bench_default",), _bandwidth),
    "predictions": Figure(("predictions",), _predictions),
    "server-load": Figure(tuple(_LOADS), _server_load),
    "server-load/rate": Figure(("server_load_int4_offset",), _load_rate),
    "stages": Figure(("stages",), _stages),
}
