"""A checkpoint larger than memory, streamed from disk: plain and drafted in turns, beside the disk.

    python -m benchmarks.cpu.offload TARGET SUB --memory 120MB --text TEST.txt \
        --questions QUESTIONS.jsonl

TARGET is a checkpoint and SUB an export of it that drafts, as `skipcat substitute` makes it; the
prompts are those of `benchmarks.cpu.lookup`. Each greedy answer is generated in three ways: plain,
with one row a call, which is the quickest without drafts; steady, with the rows that drafts are
held to bit for bit; and drafted. Before each kind the disk alone is timed by the same reads. What
each way takes of memory, and leaves in the page cache, is asked of `skipcat run` in processes of
their own. accelerate's `disk_offload` gives a few tokens beside each kind, from its own copy of the
weights on the same disk. It fails where a drafted answer is not the steady one.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table

from benchmarks import RESULTS
from benchmarks.command import SKIPCAT, run
from benchmarks.cpu.drafted_turns import (
    DRAFTED,
    PLAIN,
    STEADY,
    WAYS,
    Turns,
    drafters_of,
    in_turns,
    rates_of,
    record_of,
    tell,
    tokens_behind_prompts,
    total,
)
from benchmarks.cpu.lookup import make_prompts, one_turn
from pipeline.artefact import write_json
from pipeline.bench.measure import load_average
from pipeline.child_process import JsonChild
from pipeline.export.contract import WEIGHTS_FILE
from pipeline.memory import parse_bytes
from pipeline.model.weight_files import weight_files
from pipeline.progress import result_console
from pipeline.runtime.drafting import Drafter
from pipeline.runtime.offload.open_offloaded import open_offloaded
from pipeline.runtime.offload.streamed_session import StreamedSession
from pipeline.runtime.offload.weight_reader import WeightReader, aligned_buffer, lay_out
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.tokenizer import load_tokenizer, stop_token_ids

_DISK_BYTES, _DISK_TURNS = 256 << 20, 3


@click.command()
@click.argument("target", type=click.Path(path_type=Path, exists=True))
@click.argument("draft", type=click.Path(path_type=Path, exists=True))
@click.option("--memory", required=True, help="Budget of each way, such as 120MB.")
@click.option("--text", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--questions", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--length", type=int, help="Tokens of every draft; by default as many as pay.")
@click.option("--width", type=int, help="Most guesses at one place; 1 drafts chains.")
@click.option("--prompts", type=int, default=8, show_default=True, help="Of each kind.")
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--new-tokens", type=int, default=128, show_default=True)
@click.option(
    "--same-layers", is_flag=True, help="Do not give the plain way the bytes of the draft."
)
@click.option(
    "--rival-tokens",
    type=int,
    default=4,
    show_default=True,
    help="Of accelerate's disk_offload for each kind; 0 leaves it out.",
)
@click.option("--json", "result", type=click.Path(path_type=Path), default=RESULTS / "offload.json")
def command(
    target: Path,
    draft: Path,
    text: Path,
    questions: Path,
    result: Path,
    **settings: Any,
) -> None:
    """Measure tokens/s, tokens a call, bytes a token and memory, with and without drafts."""
    before = load_average()
    rows = _measure(target, draft, make_prompts(draft, text, questions), **settings)
    inputs = {"target": target, "draft": draft, "text": text, "questions": questions}
    record = record_of(rows, settings, before, **inputs)
    record["processes"] = {
        "plain": _of_a_process(target, settings, ()),
        "drafted": _of_a_process(target, settings, ("--draft", str(draft))),
    }
    write_json(result, record)
    _show(rows)


def _measure(
    target: Path,
    draft: Path,
    kinds: dict[str, list[list[int]]],
    memory: str,
    length: int | None,
    width: int | None,
    prompts: int,
    threads: int,
    new_tokens: int,
    same_layers: bool,
    rival_tokens: int,
) -> dict[str, dict[str, Any]]:
    """All three ways over the prompts of each kind, and accelerate over one.

    Raises:
        ValidationError: a drafted answer is another than without drafts.
    """
    torch.set_num_threads(threads)
    how: dict[str, Any] = {"threads": threads, "length": length, "width": width}
    session, model = open_offloaded(target, memory, draft, **how)
    assert model is not None
    # Without a draft its bytes are for layers, unless both are to read the same ones.
    own = parse_bytes(memory, "--memory")
    own -= (draft / WEIGHTS_FILE).stat().st_size if same_layers else 0
    plain = StreamedSession(target, own, session.max_length, steady=False)
    decoding = Decoding(new_tokens, stop_ids=stop_token_ids(load_tokenizer(target), target))
    running: dict[str, StreamedSession] = {PLAIN: plain, STEADY: session, DRAFTED: session}
    begin = drafters_of(model)
    found = {}
    rival = _Rival(target, threads, rival_tokens) if rival_tokens else None
    for kind, asked in kinds.items():
        disk = _disk_bytes_per_s(target)
        turns = in_turns(
            asked[:prompts],
            lambda way, prompt: _turn(running[way], prompt, decoding, begin[way]()),
        )
        found[kind] = _summary(turns) | {"disk_bytes_per_s": disk}
        found[kind]["resident_layers"] = {way: one.traffic.resident for way, one in running.items()}
        found[kind]["plain_share_of_disk"] = found[kind]["bytes_per_s"][PLAIN] / disk
        if rival is not None:
            theirs = rival.measure(asked[0])
            ratio = found[kind]["tokens_per_s"][PLAIN] / theirs["tokens_per_s"]
            found[kind]["accelerate"] = theirs | {"plain_ratio": ratio}
        tell(kind, found[kind], model)
    if rival is not None:
        rival.close()
    return found


class _Rival:
    """accelerate's `disk_offload`, with a copy of the weights beside the model's folder."""

    def __init__(self, target: Path, threads: int, tokens: int) -> None:
        self._tokens = tokens
        self._copy = tempfile.TemporaryDirectory(dir=target.resolve().parent, prefix="rival-")
        self._child = JsonChild([sys.executable, "-m", "benchmarks.cpu.offload_child"])
        self._child.ask(folder=str(target), scratch=self._copy.name, threads=threads)

    def measure(self, ids: list[int]) -> dict[str, float]:
        """Tokens/s behind the first, and bytes that the system read for each."""
        answer = self._child.ask(ids=ids, new_tokens=1 + self._tokens)
        return {
            "tokens_per_s": self._tokens / sum(answer["token_s"][1:]),
            "read_bytes_per_token": answer["read_bytes"] / (1 + self._tokens),
        }

    def close(self) -> None:
        """End the process, and remove the copy."""
        self._child.close()
        self._copy.cleanup()


def _turn(
    session: StreamedSession, prompt: list[int], decoding: Decoding, drafter: Drafter | None
) -> dict[str, Any]:
    """One answer, as `one_turn`, with the calls behind the prompt and their bytes."""
    before = session.traffic
    turn = one_turn(session, prompt, decoding, drafter)
    after = session.traffic
    calls = max(0, len(turn["tokens"]) - 1 - turn["taken"])
    return turn | {
        "calls": calls,
        "bytes": calls * after.pass_bytes,
        "read_bytes": after.read_bytes - before.read_bytes,  # the prompt's, too
        "waited_s": after.waited_s - before.waited_s,
    }


def _summary(turns: Turns) -> dict[str, Any]:
    """Rates over all answers, tokens a call, bytes a token, and how many answers are the same."""
    found, counts = rates_of(turns), tokens_behind_prompts(turns)
    taken_s = {way: total(turns, way, "seconds") for way in WAYS}
    read = {way: total(turns, way, "bytes") for way in WAYS}
    return found | {
        "tokens_per_call": found["tokens"] / max(1.0, total(turns, DRAFTED, "calls")),
        "bytes_per_token": {way: read[way] / counts[way] for way in WAYS},
        "bytes_per_s": {way: read[way] / taken_s[way] for way in WAYS},
        "read_bytes": {way: total(turns, way, "read_bytes") for way in WAYS},
        "waited_share": {way: total(turns, way, "waited_s") / taken_s[way] for way in WAYS},
    }


def _disk_bytes_per_s(target: Path) -> float:
    """The disk alone: the largest weight file, in the same reads, computing nothing."""
    path = max(weight_files(target), key=lambda file: file.stat().st_size)
    size = min(path.stat().st_size, _DISK_BYTES)
    reader, layout = WeightReader([path]), lay_out({"all": (0, 0, size)})
    buffer, rates = aligned_buffer(layout.size), []
    for _ in range(_DISK_TURNS):
        started = time.perf_counter()
        reader.read(layout, buffer)
        rates.append(size / (time.perf_counter() - started))
    reader.close()
    return statistics.median(rates)


def _of_a_process(target: Path, settings: dict[str, Any], flags: tuple[str, ...]) -> dict[str, Any]:
    """What `skipcat run` holds and reads for one answer, and what it leaves in the page cache."""
    few = ("--max-new-tokens", "16", "--threads", str(settings["threads"]), "--json")
    asked = ("-p", "What is a whale?", "--memory", settings["memory"], "--no-lookup")
    answer = subprocess.run(
        [*SKIPCAT, "run", str(target), *asked, *few, *flags],
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode:
        raise click.ClickException(answer.stderr.strip())
    traffic: dict[str, Any] = json.loads(answer.stdout)["traffic"]
    files = weight_files(target)
    held = sum(_cached_bytes(file) for file in files)
    return traffic | {"cached_share": held / sum(file.stat().st_size for file in files)}


def _cached_bytes(path: Path) -> int:
    """Bytes of a file that the page cache holds, by mincore."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        size = ctypes.c_size_t(len(mapped))
        if ctypes.CDLL(None).mincore(ctypes.c_void_p(address), size, pages):
            raise click.ClickException(f"{path}: mincore failed")
        return mmap.PAGESIZE * sum(page & 1 for page in pages)


def _show(rows: dict[str, dict[str, Any]]) -> None:
    """The table."""
    table = Table(
        "prompts", *WAYS, "ratio", "tokens a call", "MB a token", "plain / disk", "accelerate"
    )
    for kind, of in rows.items():
        table.add_row(
            kind,
            *(f"{of['tokens_per_s'][way]:.2f}" for way in WAYS),
            f"{of['ratio']:.2f}",
            f"{of['tokens_per_call']:.2f}",
            f"{of['bytes_per_token'][DRAFTED] / 1e6:.1f}",
            f"{of['plain_share_of_disk']:.2f}",
            f"{of['accelerate']['tokens_per_s']:.2f}" if "accelerate" in of else "",
        )
    result_console().print(table)


if __name__ == "__main__":
    sys.exit(run(command))
