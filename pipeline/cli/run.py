"""`skipcat run FOLDER`: ask the model something, on this machine's CPU."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli import options
from pipeline.cli.run_images import image_options, look_at
from pipeline.cli.run_prompts import Messages, Way, answer_all, decode_prompt, say, write_text
from pipeline.errors import UsageError
from pipeline.memory import peak_bytes
from pipeline.runtime.chat_template import require_text
from pipeline.runtime.sessions.open_session import DEVICES
from pipeline.terminal import aside

if TYPE_CHECKING:
    from pipeline.runtime.generate import Answer
    from pipeline.runtime.language_model import LanguageModel
# Messages and where the text goes -> the answer.
_Ask = Callable[[Messages, Callable[[str], None]], "Answer"]

_sampling_options = options.apply(
    options.setting("--max-new-tokens", 256, "Most tokens of an answer.", options.positive),
    options.setting("--temperature", 0.0, "0 always takes the likeliest token."),
    options.setting("--top-k", 0, "0 keeps all."),
    options.setting("--top-p", 1.0, "1 keeps all."),
    options.setting("--min-p", 0.0, "0 keeps all."),
    options.setting(
        "--repetition-penalty", 1.0, "Above 1, tokens that are there already become less likely."
    ),
    click.option("--stop", "stops", multiple=True, help="Text that ends the answer; repeatable."),
    options.setting(
        "--noise",
        "uniform",
        "What tokens are drawn by: a number each, or (gumbel) a number for each candidate, so that "
        "a draft guesses right more often. The odds are the same, the answers of a seed are not.",
        click.Choice(["uniform", "gumbel"]),
    ),
    options.seed,
    heading="Sampling",
)


@click.command("run", cls=options.GroupedCommand)
@options.folder
@click.option("-p", "--prompt", help="What to ask; without it, stdin or a conversation.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A prompt a line, or a .jsonl of prompt or messages: answered side by side, in order, "
    "each as -p would.",
)
@options.setting(
    "--batch-size", 8, "Answers of --prompts that decode together.", click.IntRange(1, 256)
)
@click.option(
    "--system", help="System message of the conversation; of --prompts, where a line has none."
)
@click.option("--raw", is_flag=True, help="Give the prompt as it is, without a chat template.")
@options.backend
@options.setting(
    "--device",
    "cpu",
    "Where PyTorch computes a checkpoint: cpu, or cuda in half precision with the block-skip "
    "kernels. Exports run on the CPU, engines on their GPU.",
    click.Choice(DEVICES),
)
@options.threads
@options.setting(
    "--lookup/--no-lookup",
    True,
    "Prompt-lookup (speculative) decoding: several draft tokens out of the conversation are "
    "checked in one call (profile cpu; not with --prompts).",
)
@options.draft
@options.budget
@options.vram
@_sampling_options
@image_options
@options.json_output
def command(
    folder: Path,
    prompt: str | None,
    prompts: Path | None,
    batch_size: int,
    system: str | None,
    raw: bool,
    images: tuple[Path, ...],
    video: Path | None,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Ask the model in FOLDER something and stream its answer to stdout.

    FOLDER is an exported ONNX folder, an engine, a compressed checkpoint, or any model folder.
    Without --prompt the prompt is read from stdin; at a terminal it becomes a conversation, of
    which each turn reads only what is new. A driving network looks at --image or --video instead.

    \b
      skipcat run build/onnx -p "What is a whale?"
      skipcat run build/cpu --prompts questions.txt --json > answers.jsonl
      skipcat run ./my-llama --memory 2GB --draft small -p "What is a whale?"
      echo "Once upon a time" | skipcat run build/checkpoint --raw
      skipcat run net --image road.jpg -o seen
    """  # noqa: D301 - click reads the escape
    if images or video is not None or output is not None:
        runtime = {name: settings[name] for name in ("backend", "threads", "device")}
        look_at(folder, images, video, output, overwrite, as_json, **runtime)
        return
    stops: tuple[str, ...] = settings["stops"]
    for flag, text in (("--prompt", prompt), ("--system", system), *(("--stop", s) for s in stops)):
        require_text(text or "", flag)
    opening = [{"role": "system", "content": system}] if system else []
    way = Way.of(folder, opening, raw, as_json, **settings)
    if prompts is not None:
        if prompt is not None or (way.device != "cpu" and way.vram is None):
            raise UsageError(
                "--prompts goes with neither --prompt nor, without --vram, --device cuda."
            )
        _require_sensible(raw, system, False)
        answer_all(way, prompts, batch_size)
        return
    if prompt is None and sys.stdin is None:
        raise UsageError("There is no prompt.", change="pass -p, or a prompt on stdin")
    converse = prompt is None and sys.stdin.isatty()
    _require_sensible(raw, system, converse and as_json)
    _answer(way, None if converse else _read_stdin() if prompt is None else prompt)


def _answer(way: Way, prompt: str | None) -> None:
    """Answer one prompt, or, without one, hold a conversation."""
    import numpy as np

    from pipeline.runtime.drafting import PROMPT_LOOKUP
    from pipeline.runtime.language_model import LanguageModel

    # All answers of a conversation draw from one source.
    decoding = replace(way.decoding, seed=np.random.default_rng(way.decoding.seed))
    drafter = PROMPT_LOOKUP if way.lookup else None
    place = way.folder, way.backend, way.threads, way.device
    model = LanguageModel.open(*place, drafter, way.draft, way.memory, way.vram)

    def ask(messages: Messages, emit: Callable[[str], None]) -> Answer:
        return model.chat(way.opening + messages, decoding, emit, way.raw)

    if prompt is None:
        _hold_conversation(model, ask)
    else:
        _answer_once(model, ask, prompt, way.as_json)


def _require_sensible(raw: bool, system: str | None, conversation_as_json: bool) -> None:
    """Raise UsageError for flags that contradict each other."""
    if raw and system:
        raise UsageError("--system needs the chat template, which --raw leaves out.")
    if conversation_as_json:
        raise UsageError("--json answers one prompt.", change="pass -p, or a prompt on stdin")


def _answer_once(model: LanguageModel, ask: _Ask, prompt: str, as_json: bool) -> None:
    """Answer one prompt: the text as it comes, or everything as JSON at the end."""
    messages = [{"role": "user", "content": prompt}]
    if as_json:
        result = ask(messages, lambda text: None)
        found = {"schema": 1, "backend": model.name, **result.to_json()}
        if model.traffic:
            found["traffic"] = model.traffic | {"peak_bytes": peak_bytes()}
        click.echo(json.dumps(found))
        say(model.take_notice())
        return
    result = ask(messages, write_text)
    click.echo()
    _report(model, result)


def _hold_conversation(model: LanguageModel, ask: _Ask) -> None:
    """Ask and answer until end of input."""
    aside(f"{model.name}; end with Ctrl-D")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a message then says which byte it is
    messages: Messages = []
    while True:
        aside("> ", end="")
        line = sys.stdin.readline()
        if not line:
            aside()
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.rstrip("\r\n")})
        result = ask(messages, write_text)
        click.echo()
        messages.append({"role": "assistant", "content": result.text})
        _report(model, result)


def _report(model: LanguageModel, result: Answer) -> None:
    """Say on stderr how fast it was, and if the answer was cut short."""
    rate = "" if result.tokens_per_s is None else f", {result.tokens_per_s:.1f} tokens/s"
    if result.drafted_tokens:
        rate += f", {result.taken_tokens} of {result.drafted_tokens} draft tokens accepted"
    aside(
        f"[{model.name}: {result.prompt_tokens} + {result.new_tokens} tokens, "
        f"first after {result.first_token_s:.2f} s{rate}]"
    )
    if read := model.traffic:
        moved = f"{read['read_bytes'] / 1e6:.0f} MB read from disk"
        held = f"peak memory {peak_bytes() / 1e6:.0f} MB"
        if read["device_peak_bytes"]:
            moved = f"{read['copied_bytes'] / 1e6:.0f} MB copied to the GPU"
            held += f", of the GPU {read['device_peak_bytes'] / 1e6:.0f} MB"
        aside(
            f"[{moved}, for {read['passes']} calls; {read['waited_s']:.1f} s waited for it; {held}]"
        )
    say(model.take_notice())
    if result.ended == "length":
        aside("[cut at --max-new-tokens]")
    if result.ended == "context":
        aside(f"[the cache of {model.max_length} tokens is full]")


def _read_stdin() -> str:
    """All of stdin.

    Raises:
        InputError: it is not UTF-8.
    """
    binary = getattr(sys.stdin, "buffer", None)  # a test's stdin has none
    return sys.stdin.read() if binary is None else decode_prompt(binary.read(), "stdin")
