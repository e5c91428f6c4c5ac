"""`skipcat validate BUILD_FOLDER`: the same inputs through every stage, and a verdict on each."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from pipeline.cli import options
from pipeline.errors import UsageError
from pipeline.terminal import aside

if TYPE_CHECKING:
    from validate.artefacts import Artefacts
    from validate.record import Ledger

_existing_folder = click.Path(path_type=Path, exists=True, file_okay=False)

_artefact_options = options.apply(
    click.argument("build_folder", type=_existing_folder, required=False),
    click.option("--original", help="The model before compression: alias, hub id, folder, .gguf."),
    click.option("--checkpoint", type=_existing_folder, help="Compressed checkpoint."),
    click.option(
        "--beside",
        type=_existing_folder,
        multiple=True,
        help="Another checkpoint, measured in a row of its own; repeatable.",
    ),
    click.option("--onnx", type=_existing_folder, multiple=True, help="ONNX export; repeatable."),
    click.option("--engine", type=_existing_folder, multiple=True, help="Engine; repeatable."),
)
_input_options = options.apply(
    options.setting(
        "--text", "self", "UTF-8 file to evaluate on; 'self' lets the original write the text."
    ),
    options.setting(
        "--windows", 10, "Windows of the text, for logits and perplexity.", options.positive
    ),
    options.setting(
        "--window-length", 512, "Tokens in each.", click.IntRange(32, options.window_length.max)
    ),
    options.setting(
        "--prompts",
        8,
        "Prompts of 32 tokens, cut from the windows, that every stage answers greedily.",
        options.positive,
    ),
    options.setting("--max-new-tokens", 64, "Tokens of each answer.", options.positive),
    options.seed,
)
_image_options = options.apply(
    click.option(
        "--images",
        help="Of an image classifier, in place of the text: a folder of images (in sub-folders by "
        "class if labelled), or a .npz, .npy or .safetensors of arrays. Of a driving network: a "
        "folder of images without labels.",
    ),
    click.option(
        "--data",
        help="Of a driving network: a labelled set, as `skipcat train --data` takes it; of it, "
        "what is there to validate on.",
    ),
    click.option(
        "--image-count",
        type=options.positive,
        help="Images to draw, or of a driving network to take at most. [1024; 160]",
    ),
)


@click.command("validate")
@_artefact_options
@_input_options
@_image_options
@click.option(
    "--max-kl",
    type=options.not_negative,
    help="Fail above this KL to the original, nats per token or image; no limit.",
)
@click.option("--strict", is_flag=True, help="Fail also when an engine cannot run here.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="[BUILD_FOLDER/ledger]")
@options.own_threads
@options.overwrite
@options.dry_run
@options.trust_remote_code
@options.json_output
def command(
    build_folder: Path | None,
    original: str | None,
    checkpoint: Path | None,
    beside: tuple[Path, ...],
    onnx: tuple[Path, ...],
    engine: tuple[Path, ...],
    output: Path | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Run the same inputs through every stage of BUILD_FOLDER and compare.

    BUILD_FOLDER holds checkpoint/, onnx*/ and engine*/. The stages can also be given one by one:
    an --onnx or --engine should equal the --checkpoint, or the --original if there is none.
    An image classifier is given --images instead; its accuracy is measured where they are labelled.
    A driving network is given --data, whose labels its boxes and masks are scored against.
    Writes ledger.json and ledger.html. Exit status 5: a stage is beyond its tolerance.
    """
    found = _gather(build_folder, original, checkpoint, onnx, engine)
    artefacts = replace(found, beside=beside)
    output = output or (build_folder / "ledger" if build_folder else None)
    if dry_run:
        _list_stages(artefacts, output)
        return

    from validate.report import reported
    from validate.run import ValidateRequest, validate

    # What was left at its default is for the task to decide.
    source = click.get_current_context().get_parameter_source
    given = {n: v for n, v in settings.items() if source(n) is not ParameterSource.DEFAULT}
    ledger = reported(
        lambda: validate(ValidateRequest.of(artefacts, **given), aside),
        output,
        overwrite=overwrite,
        inputs=(*artefacts.inputs, settings["text"], *_images_of(settings)),
    )
    _show(ledger, output, as_json)
    ledger.require_passed()


def _images_of(settings: dict[str, Any]) -> list[str]:
    """Paths of images that are read."""
    return [(settings[name] or "").partition(":")[0] for name in ("images", "data")]


def _gather(
    build_folder: Path | None,
    original: str | None,
    checkpoint: Path | None,
    onnx: tuple[Path, ...],
    engine: tuple[Path, ...],
) -> Artefacts:
    """The artefacts out of the arguments; a flag replaces what the build folder has.

    Raises:
        UsageError: there is nothing that names the original.
    """
    from validate.artefacts import Artefacts, original_of

    if build_folder is not None:
        found = Artefacts.find(build_folder)
        return Artefacts(
            original or found.original,
            checkpoint or found.checkpoint,
            onnx or found.onnx,
            engine or found.engines,
        )
    if original is None and checkpoint is None:
        raise UsageError(
            "There is nothing to compare with.",
            change="give a build folder, or pass --original or --checkpoint",
        )
    name = original if original is not None or checkpoint is None else original_of(checkpoint)
    return Artefacts(str(name), checkpoint, onnx, engine)


def _show(ledger: Ledger, output: Path | None, as_json: bool) -> None:
    """The ledger on stdout, as a table or as JSON."""
    if as_json:
        click.echo(json.dumps(ledger.to_json(), indent=2))
        return
    from validate.report import print_ledger

    print_ledger(ledger, sys.stdout)
    if output is not None:
        aside(f"wrote {output / 'ledger.json'} and {output / 'ledger.html'}")


def _list_stages(artefacts: Artefacts, output: Path | None) -> None:
    """Say what would be compared with what."""
    from validate.stages import ORIGINAL, Openers, standard_stages

    def open_nothing(*_: Any) -> Any:
        raise UsageError("--dry-run opens nothing.")

    nothing = Openers(open_nothing, open_nothing, open_nothing)
    for stage in standard_stages(artefacts, nothing, open_nothing):
        source = artefacts.original if stage.name == ORIGINAL else f"against {stage.reference}"
        click.echo(f"{stage.name}: {source}")
    aside(f"would write {output}" if output else "would write nothing")
