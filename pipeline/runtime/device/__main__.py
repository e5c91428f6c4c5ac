"""`skipcat-device VERB`: an engine on the GPU of this board, with numpy, tokenizers and TensorRT.

Runs on Python 3.10 (JetPack 6.2) and newer, without torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import __version__
from pipeline.errors import InputError, PipelineError, UsageError, explain
from pipeline.json_file import read_json_object
from pipeline.terminal import aside, drop_stdout, guarded, safe_stdout

if TYPE_CHECKING:
    from pipeline.runtime.device.session import DeviceSession

_OLDEST_PYTHON = (3, 10)


def _run(options: argparse.Namespace) -> None:
    """Answer a prompt, and stream the text."""
    from pipeline.runtime.device.bundle import engine_of
    from pipeline.runtime.generate import answer
    from pipeline.runtime.sampling import Sampling
    from pipeline.runtime.sequence import Decoding
    from pipeline.runtime.tokenizer import chat_prompt_ids, load_tokenizer, stop_token_ids

    if options.prompt is None and sys.stdin.isatty():
        raise UsageError("There is no prompt.", change="pass -p, or a prompt on stdin")
    prompt = sys.stdin.read() if options.prompt is None else options.prompt
    folder = engine_of(options.folder)
    tokenizer = load_tokenizer(folder)
    system = [{"role": "system", "content": options.system}] if options.system else []
    messages = [*system, {"role": "user", "content": prompt}]
    ids = chat_prompt_ids(tokenizer, messages, options.raw)
    how = Decoding(
        max_new_tokens=options.max_new_tokens,
        sampling=Sampling(
            options.temperature, options.top_k, options.top_p, options.min_p,
            options.repetition_penalty,
        ),
        stop_ids=stop_token_ids(tokenizer, folder),
        stops=tuple(options.stop),
        seed=options.seed,
    )  # fmt: skip
    session = _open(options)
    if options.json:
        _print(answer(session, tokenizer, ids, how).to_json())
        return
    found = answer(session, tokenizer, ids, how, lambda text: print(text, end="", flush=True))
    print()
    rate = "" if found.tokens_per_s is None else f", {found.tokens_per_s:.1f} tokens/s"
    aside(f"[{found.new_tokens} tokens, first after {found.first_token_s:.2f} s{rate}]")


def _selftest(options: argparse.Namespace) -> None:
    """Compute the same in several ways, and a bundle's answers; exits with 5 where they differ."""
    from pipeline.runtime.device.bundle import BUNDLE_FILE, require_reference, require_whole
    from pipeline.runtime.device.selftest import Outcome, run_selftest

    is_bundle = (options.folder / BUNDLE_FILE).is_file()
    if is_bundle:
        require_whole(options.folder)
    session = _open(options)
    outcomes = run_selftest(session)
    if is_bundle:
        said = require_reference(options.folder, session)
        outcomes += [Outcome(f"the answer to {prompt!r}", cosine) for prompt, cosine in said]
    if options.json:
        _print({"captured": session.is_captured, "checks": [vars(one) for one in outcomes]})
        return
    for one in outcomes:
        print(f"ok  {one.name} (cosine {one.cosine:.6f})")
    print(f"the step runs {'as a CUDA graph' if session.is_captured else 'without a CUDA graph'}")


def _build(options: argparse.Namespace) -> None:
    """Build the engine of a bundle on this board, and test it as `selftest` does."""
    from pipeline.runtime.device.build import build_bundle
    from pipeline.runtime.device.bundle import require_whole
    from pipeline.runtime.device.describe import describe, open_driver
    from pipeline.runtime.device.engine import load_device_library

    load_device_library()
    driver, why_none = open_driver()
    if driver is None:
        raise InputError("An engine is built on the GPU that runs it.", observed=why_none)
    require_whole(options.folder)
    device = describe(driver)
    del driver
    build_bundle(
        options.folder,
        device,
        aside,
        plugin=options.plugin,
        overwrite=options.overwrite,
        timeout_s=options.timeout,
    )
    _selftest(options)


def _describe(options: argparse.Namespace) -> None:
    """Say as JSON what this machine is; what cannot be found out is null."""
    from pipeline.runtime.device.describe import describe, open_driver

    driver, why_none = open_driver()
    if why_none is not None:
        aside(why_none)
    _print(describe(driver))


def _preflight(options: argparse.Namespace) -> None:
    """Say whether an engine can run here, or on a described device; exits with 3 or 4 if not."""
    from pipeline.runtime.device.build import check_build
    from pipeline.runtime.device.bundle import engine_of, is_to_be_built
    from pipeline.runtime.device.describe import describe, open_driver
    from pipeline.runtime.device.preflight import check_device

    if options.device is None:
        driver, why_none = open_driver()
        if why_none is not None:
            aside(why_none)
        device = describe(driver)
    else:
        device = read_json_object(options.device)
    if is_to_be_built(options.folder):
        said = check_build(options.folder, device)
        if options.json:
            _print({"build": said})
            return
        print("\n".join([*said, "the engine of this bundle can be built here: `build` does it"]))
        return
    found = check_device(engine_of(options.folder), device)
    if options.json:
        _print(found)
        return
    for name, size in found["needed_bytes"].items():
        print(f"{name:<12}{size / 1e6:>10.1f} MB")
    free = found["available_bytes"]
    print(f"{'free':<12}" + (f"{free / 1e6:>10.1f} MB" if free is not None else "unknown"))
    for what in found["unknown"]:
        print(f"not looked at: {what}, which the description does not say")


def _open(options: argparse.Namespace) -> DeviceSession:
    from pipeline.runtime.device.bundle import engine_of
    from pipeline.runtime.device.session import DeviceSession

    return DeviceSession.open(engine_of(options.folder), options.plugin, aside)


def _print(value: Any) -> None:
    print(json.dumps(value, indent=2))


class _Parser(argparse.ArgumentParser):
    """Raises instead of leaving."""

    def error(self, message: str) -> Any:
        raise UsageError(message, change=f"see {self.prog} --help")


_VERBS: dict[str, Callable[[argparse.Namespace], None]] = {
    "run": _run, "selftest": _selftest, "preflight": _preflight, "describe": _describe,
    "build": _build,
}  # fmt: skip


def _make_parser() -> _Parser:
    parser = _Parser(prog="skipcat-device", description=__doc__.partition("\n")[0])
    parser.add_argument("--version", action="version", version=f"skipcat-device {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    made = {
        name: verbs.add_parser(name, help=verb.__doc__, description=verb.__doc__)
        for name, verb in _VERBS.items()
    }
    for name, verb in made.items():
        if name != "describe":
            verb.add_argument("folder", type=Path, help="bundle, or engine folder")
            verb.add_argument("--json", action="store_true", help="JSON on stdout")
    for name in ("run", "selftest", "build"):
        made[name].add_argument("--plugin", type=Path, help="block-skip library of the engine")
    made["preflight"].add_argument(
        "--device", type=Path, help="JSON of `describe` on another machine; this one without it"
    )
    made["build"].add_argument(
        "--overwrite", action="store_true", help="replace the engine that is there"
    )
    made["build"].add_argument(
        "--timeout", type=float, default=7200.0, help="most seconds of a build; default 7200"
    )
    _add_answer_options(made["run"])
    return parser


def _add_answer_options(parser: argparse.ArgumentParser) -> None:
    """What `skipcat run` has by the same names."""
    parser.add_argument("-p", "--prompt", help="what to ask; without it, stdin")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--raw", action="store_true", help="no chat template")
    parser.add_argument("--stop", action="append", default=[], help="text that ends the answer")
    numbers: dict[str, tuple[type, float]] = {
        "max-new-tokens": (int, 256), "temperature": (float, 0.0), "top-k": (int, 0),
        "top-p": (float, 1.0), "min-p": (float, 0.0), "repetition-penalty": (float, 1.0),
        "seed": (int, 0),
    }  # fmt: skip
    for name, (kind, usual) in numbers.items():
        parser.add_argument(f"--{name}", type=kind, default=usual, help=f"default {usual}")


def main(arguments: list[str] | None = None) -> int:
    """Run a verb; return the exit status of `pipeline.errors`."""
    if sys.version_info < _OLDEST_PYTHON:
        print("error: skipcat-device needs Python 3.10 or newer", file=sys.stderr)
        return UsageError.exit_status
    try:
        options = _make_parser().parse_args(arguments)
        with safe_stdout():
            _VERBS[options.verb](options)
        sys.stdout.flush()
    except BrokenPipeError:
        return drop_stdout()
    except SystemExit as leave:  # of --help and --version
        return leave.code if isinstance(leave.code, int) else 0
    except BaseException as error:
        failure = explain(error)
        if failure is None:
            raise
        if failure.exit_status == PipelineError.exit_status and failure is not error:
            traceback.print_exception(type(error), error, error.__traceback__)
        print(f"error: {failure}", file=guarded(sys.stderr))
        return failure.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
