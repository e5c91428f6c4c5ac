"""`skipcat run` of a network that looks at images or at a video."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pipeline.cli import options
from pipeline.errors import UsageError
from pipeline.terminal import aside

# Flags of every kind of model.
_SHARED = {
    "folder", "images", "video", "output", "overwrite", "as_json", "backend", "threads", "device",
}  # fmt: skip

image_options = options.apply(
    click.option(
        "--image",
        "images",
        multiple=True,
        type=click.Path(path_type=Path, exists=True),
        help="An image, or a folder of images; repeatable.",
    ),
    click.option(
        "--video",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="A video, in place of images (needs the extra `video`).",
    ),
    click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        help="Folder for what is drawn, masks and perception.jsonl; without it nothing is drawn.",
    ),
    options.overwrite,
    heading="Driving networks",
)


def look_at(
    folder: Path,
    images: tuple[Path, ...],
    video: Path | None,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    **runtime: Any,
) -> None:
    """Say of each image what is seen in it, a line each, and draw it.

    Args:
        folder: of a network.
        images: files and folders.
        video: a file.
        output: where to draw; None draws nothing.
        overwrite: replace it.
        as_json: an object a line.
        runtime: backend, threads and device.

    Raises:
        PipelineError: flags of a language model, or whatever cannot be looked at.
    """
    from pipeline.model.task import looker_of
    from pipeline.output import check_output

    _refuse_flags_of_text()
    look = looker_of(folder)
    if output is not None:
        check_output(output, overwrite=overwrite, inputs=(folder, *images, video or ""))
    request = look(folder, images, video, output, overwrite=overwrite, **runtime)
    summary = request.run(lambda line: click.echo(json.dumps(line) if as_json else _words(line)))
    times = ", ".join(f"{step} {ms:.1f}" for step, ms in summary["mean_ms"].items())
    aside(f"[{summary['backend']}: {summary['images']} images; mean ms: {times}]")
    if output is not None:
        aside(f"wrote {output}")


def _refuse_flags_of_text() -> None:
    """Raise UsageError for a flag of prompts, which would do nothing."""
    context = click.get_current_context()
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in _SHARED
        and context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
    ]
    if given:
        raise UsageError(
            "What looks at images takes no prompt.",
            where=", ".join(given),
            change="leave it out, or leave --image, --video and --output out",
        )


def _words(line: dict[str, Any]) -> str:
    """What was seen, for people."""
    labels = [f"{box['label']} {box['score']:.2f}" for box in line["boxes"]]
    name = line.get("image") or f"frame {line['frame']}"
    ms = " ".join(f"{step} {value:.1f}" for step, value in line["ms"].items())
    return (
        f"{name}: {', '.join(labels) or 'no boxes'}; drivable {line['drivable_share']:.1%}, "
        f"lane lines {line['lane_share']:.1%} [{ms} ms]"
    )
