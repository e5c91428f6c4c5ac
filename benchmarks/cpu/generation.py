"""Generation on the CPU: ours, llama.cpp and onnxruntime-genai, interleaved in one run.

    skipcat export MODEL_FOLDER -o cpu-int8 --profile cpu
    python -m onnxruntime_genai.models.builder -i MODEL_FOLDER -o genai -p int4 -e cpu -c cache
    npm install --ignore-scripts --prefix LLAMA node-llama-cpp@3.22
    python -m benchmarks.cpu.generation --ours cpu-int8 --genai genai --llama LLAMA --gguf FILE \
        --text TEST.txt --tokenizer cpu-int8

Each engine lives in a process of its own and waits in a read while the others are measured; they
take turns by repetition. A turn reads a prompt (prefill) and generates greedily (decode: the
tokens after the first by the time they took together, which a user waits for; the median of the
single tokens beside it). Every engine then scores the same tokens of the text, with its own
arithmetic; and starts once more from a cold process. Memory is the process's own peak after a
context of 2,048 tokens.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.table import Table

from benchmarks import RESULTS
from benchmarks.command import run
from pipeline.artefact import write_json
from pipeline.bench.measure import describe_machine, load_average
from pipeline.child_process import ChildEndedError, JsonChild
from pipeline.memory import peak_bytes
from pipeline.progress import note, result_console
from pipeline.provenance import provenance
from pipeline.runtime.tokenizer import load_tokenizer

SCHEMA = 1
RESULT = RESULTS / "generation.json"
CONTEXT = 2048
COLD_PROMPT = 32
LLAMA_CHILD = Path(__file__).with_name("generation_child.mjs")


@dataclass
class Engine:
    """A child process that answers requests in lines of JSON.

    Attributes:
        name: of the row.
        command: what starts it.
        ours: whether it is this project's.
        turns: what was measured: prompt length -> list of answers.
        lookup: whether it decodes by prompt lookup.
    """

    name: str
    command: list[str]
    ours: bool
    turns: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    child: JsonChild | None = None
    lookup: bool = False

    def start(self) -> float:
        """Start the process and wait until the model is loaded; seconds."""
        started = time.perf_counter()
        self.child = JsonChild(self.command)
        self._answered(self.child.hear)
        return time.perf_counter() - started

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one answer."""
        assert self.child is not None
        return self._answered(partial(self.child.ask, **request))

    def _answered(self, answer: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return answer()
        except ChildEndedError as end:
            message = f"{self.name} ended ({end}): {' '.join(self.command)}"
            raise click.ClickException(message) from end

    def peak_bytes(self) -> int:
        """Most memory the process had at once."""
        assert self.child is not None
        return peak_bytes(self.child.pid)

    def stop(self) -> None:
        """End the process."""
        if self.child is not None:
            self.child.close()
            self.child = None


@click.command()
@click.option("--ours", multiple=True, required=True, help="Folder to run; may be repeated.")
@click.option("--genai", multiple=True, help="Folder of onnxruntime-genai's builder.")
@click.option("--llama", help="Folder with node_modules/node-llama-cpp.")
@click.option("--gguf", help="Model for llama.cpp.")
@click.option(
    "--lookup", is_flag=True, help="Once more by prompt-lookup decoding: ours and llama.cpp."
)
@click.option("--text", type=click.Path(path_type=Path), required=True, help="To score.")
@click.option("--tokenizer", type=click.Path(path_type=Path), required=True, help="Folder.")
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--repetitions", type=int, default=5, show_default=True)
@click.option("--new-tokens", type=int, default=128, show_default=True)
@click.option("--windows", type=int, default=8, show_default=True, help="Scored windows.")
@click.option("--window-length", type=int, default=512, show_default=True)
@click.option("--json", "result", type=click.Path(path_type=Path), default=RESULT)
def command(
    ours: tuple[str, ...],
    genai: tuple[str, ...],
    llama: str | None,
    gguf: str | None,
    lookup: bool,
    text: Path,
    tokenizer: Path,
    threads: int,
    repetitions: int,
    new_tokens: int,
    windows: int,
    window_length: int,
    result: Path,
) -> None:
    """Measure prefill, decode, perplexity, memory and cold start of every engine."""
    loads = [load_average()]
    read = text.read_text(encoding="utf-8")
    words = load_tokenizer(tokenizer).encode(read[: 20 * CONTEXT * 8], add_special_tokens=False)
    ids = np.array(words)
    engines = make_engines(ours, genai, llama, gguf, threads)
    if lookup:
        engines += [
            Engine(f"{engine.name}, lookup", engine.command, engine.ours, lookup=True)
            for engine in engines
            if engine.ours or engine.name == "llama.cpp"
        ]
    rows = measure(engines, ids, repetitions, new_tokens, windows, window_length)
    record = {
        "schema": SCHEMA,
        "machine": describe_machine() | {"threads": threads},
        "provenance": provenance(),
        "settings": {
            "repetitions": repetitions,
            "new_tokens": new_tokens,
            "scored": [windows, window_length],
            "text": text.name,
        },
        "load_average": [*loads, load_average()],
        "rows": rows,
    }
    write_json(result, record)
    show(rows)


def make_engines(
    ours: tuple[str, ...],
    genai: tuple[str, ...],
    llama: str | None,
    gguf: str | None,
    threads: int,
) -> list[Engine]:
    """One engine for every model that was named."""
    python = [sys.executable, "-m", "benchmarks.cpu.generation_child"]
    count = [str(threads)]
    engines = [
        Engine(
            f"{kind} {Path(folder).name}",
            [*python, kind, str(Path(folder).resolve()), *count],
            kind == "ours",
        )
        for kind, folders in (("ours", ours), ("genai", genai))
        for folder in folders
    ]
    if llama and gguf:
        child = Path(llama).resolve() / "generation_child.mjs"
        shutil.copyfile(LLAMA_CHILD, child)
        llama_command = ["node", str(child), str(Path(gguf).resolve()), *count]
        engines.append(Engine("llama.cpp", llama_command, False))
    return engines


def measure(
    engines: list[Engine],
    ids: np.ndarray,
    repetitions: int,
    new_tokens: int,
    windows: int,
    window_length: int,
) -> list[dict[str, Any]]:
    """All figures of all engines."""
    for engine in engines:
        engine.start()
    for repetition in range(repetitions + 1):
        for prompt in (128, 512):
            for engine in engines:
                start = repetition * 512
                turn = engine.ask(
                    do="generate",
                    ids=ids[start : start + prompt].tolist(),
                    new=new_tokens,
                    lookup=engine.lookup,
                )
                if repetition:  # the first warms up
                    engine.turns.setdefault(prompt, []).append(turn)
        note(f"repetition {repetition} of {repetitions}")
    rows = []
    perplexities: dict[tuple[str, ...], float] = {}  # the same with drafts and without
    for engine in engines:
        note(f"{engine.name}: perplexity, memory, cold start")
        model = tuple(engine.command)
        if model not in perplexities:
            nlls = [
                engine.ask(do="score", ids=ids[k * window_length :][:window_length].tolist())["nll"]
                for k in range(windows)
            ]
            perplexities[model] = float(np.exp(np.mean(nlls)))
        engine.stop()
        rows.append(row_of(engine, perplexities[model]) | cold_and_full(engine, ids))
    return rows


def cold_and_full(engine: Engine, ids: np.ndarray) -> dict[str, Any]:
    """Seconds from the start of the process to the first token; peak memory of a full context."""
    started = time.perf_counter()
    engine.start()
    engine.ask(do="generate", ids=ids[:COLD_PROMPT].tolist(), new=1, lookup=engine.lookup)
    first = time.perf_counter() - started
    engine.ask(do="generate", ids=ids[: CONTEXT - 16].tolist(), new=15, lookup=engine.lookup)
    peak = engine.peak_bytes()
    engine.stop()
    return {"cold_first_token_s": first, "peak_bytes_at_2048": peak}


def row_of(engine: Engine, perplexity: float) -> dict[str, Any]:
    """Medians over the repetitions."""
    row: dict[str, Any] = {"engine": engine.name, "ours": engine.ours, "perplexity": perplexity}
    for prompt, turns in engine.turns.items():
        prefill = [prompt / turn["prefill_s"] for turn in turns]
        decode = [len(turn["token_s"]) / sum(turn["token_s"]) for turn in turns]
        row |= {
            f"prefill_{prompt}_tokens_per_s": statistics.median(prefill),
            f"decode_after_{prompt}_tokens_per_s": statistics.median(decode),
            f"all_prefill_{prompt}": prefill,
            f"all_decode_{prompt}": decode,
        }
        if not engine.lookup:  # whose tokens come several at once
            single = [1 / statistics.median(turn["token_s"]) for turn in turns]
            row[f"decode_after_{prompt}_single_token_median"] = statistics.median(single)
    return row


def show(rows: list[dict[str, Any]]) -> None:
    """The table, and ours as multiples of each rival that is at least as good."""
    columns = [
        ("perplexity", "perplexity", 2),
        ("prefill 128", "prefill_128_tokens_per_s", 0),
        ("prefill 512", "prefill_512_tokens_per_s", 0),
        ("decode after 128", "decode_after_128_tokens_per_s", 1),
        ("after 512", "decode_after_512_tokens_per_s", 1),
        ("single token", "decode_after_128_single_token_median", 1),
        ("cold s", "cold_first_token_s", 2),
    ]
    table = Table("engine", *(title for title, _, _ in columns), "MB at 2048")
    for row in rows:
        cells = [f"{row[key]:.{digits}f}" if key in row else "" for _, key, digits in columns]
        table.add_row(row["engine"], *cells, f"{row['peak_bytes_at_2048'] / 1e6:.0f}")
    result_console().print(table)
    for mine in (row for row in rows if row["ours"]):
        for other in (row for row in rows if not row["ours"]):
            better = "no worse" if mine["perplexity"] <= other["perplexity"] else "worse"
            decode, prefill = (
                mine[key] / other[key]
                for key in ("decode_after_128_tokens_per_s", "prefill_512_tokens_per_s")
            )
            click.echo(
                f"{mine['engine']} / {other['engine']}: decode {decode:.2f} x, "
                f"prefill of 512 {prefill:.2f} x, perplexity {better}"
            )


if __name__ == "__main__":
    sys.exit(run(command))
