"""`skipcat serve FOLDER`: an HTTP server with OpenAI's interface."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import click

from pipeline.cli import options
from pipeline.errors import InputError, MissingPackageError, UsageError
from pipeline.json_file import read_text_file

_PACKAGES = ("starlette", "uvicorn", "pydantic")
_seconds = options.above_zero

_address_options = options.apply(
    options.setting("--host", "127.0.0.1", "Address to listen at."),
    options.setting("--port", 8000, "0 takes a free one.", click.IntRange(0, 65535)),
    click.option(
        "--api-key-file",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="Accepted keys, one a line, # before comments; without it everybody is served.",
    ),
    click.option(
        "--allowed-host",
        "allowed_hosts",
        multiple=True,
        metavar="NAME",
        help="A name that clients call the server by; several times for several, '*' for any.  "
        "[without keys: addresses, localhost and --host; with keys: any]",
    ),
    click.option(
        "--cors-origin",
        "cors_origins",
        multiple=True,
        metavar="ORIGIN",
        help="Where web pages that may use the server come from, such as https://app.example; "
        "several times for several, '*' for any.  [none]",
    ),
    click.option("--model-name", help="What clients call the model.  [the folder's name]"),
    heading="Address",
)
_load_options = options.apply(
    options.setting(
        "--slots", 4, "Requests answered together; each has a cache of its own.", options.positive
    ),
    options.setting(
        "--queue",
        64,
        "Requests that wait for a slot; further ones get a 429.",
        options.count,
    ),
    options.setting(
        "--prefill-chunk",
        64,
        "Tokens of a prompt read between two tokens of the other answers.",
        options.positive,
    ),
    options.setting(
        "--prefix-reuse/--no-prefix-reuse",
        True,
        "Go on from what a slot still holds of an earlier conversation.",
        name="reuse",
    ),
    options.setting(
        "--lookup/--no-lookup",
        False,
        "Prompt-lookup (speculative) decoding of an answer that runs alone (profile cpu): "
        "near-ties may then turn with the other requests. With --memory of all, and none turns.",
    ),
    options.draft,
    options.budget,
    heading="Requests side by side",
)
_limit_options = options.apply(
    click.option(
        "--max-new-tokens",
        type=options.positive,
        help="Most tokens of one answer.  [the context's]",
    ),
    options.setting(
        "--max-body-bytes", 1 << 20, "Longest request; a longer one gets a 413.", options.positive
    ),
    options.setting(
        "--client-timeout-s",
        30.0,
        "Longest a client may take to send, to read, or between requests.",
        _seconds,
    ),
    options.setting(
        "--grace-s",
        10.0,
        "Time for running answers after SIGTERM or Ctrl-C.",
        options.not_negative,
    ),
    heading="Limits",
)


@click.command("serve", cls=options.GroupedCommand)
@options.folder
@options.backend
@options.threads
@_address_options
@_load_options
@_limit_options
def command(
    folder: Path,
    api_key_file: Path | None,
    max_new_tokens: int | None,
    max_body_bytes: int,
    client_timeout_s: float,
    **settings: Any,
) -> int:
    """Serve the model in FOLDER to any client of OpenAI's interface.

    FOLDER is what `skipcat run` takes. SIGTERM and Ctrl-C end the running answers and then the
    server.

    \b
      skipcat serve build/onnx
      curl http://127.0.0.1:8000/v1/models
    """  # noqa: D301 - click reads the escape
    _require_packages()
    _require_callers(settings["allowed_hosts"], settings["cors_origins"])
    from pipeline.serve.app import Limits
    from pipeline.serve.server import ServeRequest, serve

    keys = _read_keys(api_key_file) if api_key_file else ()
    limits = Limits(max_body_bytes, max_new_tokens, client_timeout_s)
    return serve(ServeRequest(folder=folder, keys=keys, limits=limits, **settings))


def _require_packages() -> None:
    """Raise MissingPackageError when a package of the extra `serve` is not installed."""
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(package, "serve", "serve a model")


def _require_callers(hosts: tuple[str, ...], origins: tuple[str, ...]) -> None:
    """Raise UsageError for what no client can call the server, and no browser an origin."""
    from pipeline.serve.gate import host_name, is_origin

    for name in hosts:
        if host_name(name) is None:
            raise UsageError("This is no host.", observed=name, expected="a name, without http://")
    for origin in origins:
        if not is_origin(origin):
            expected = "scheme://name or scheme://name:port, without a path"
            raise UsageError("This is no origin.", observed=origin, expected=expected)


def _read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file, one a line; lines that begin with # are comments.

    Raises:
        UsageError: there is none, one that no client can send, or the file is not text.
    """
    try:
        lines = [line.strip() for line in read_text_file(path).split("\n")]
    except InputError as error:
        observed = error.details.get("observed")
        raise UsageError("The key file cannot be read.", where=path, observed=observed) from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise UsageError("The key file holds no key.", where=path, expected="one key a line")
    for number, line in enumerate(lines, 1):
        if line in keys and not all("!" <= letter <= "~" for letter in line):
            raise UsageError(
                "No client can send this key.",
                where=f"{path}:{number}",
                expected="letters, digits and signs of ASCII, without blanks",
            )
    return keys
