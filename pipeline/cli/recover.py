"""`skipcat recover`: fine-tune the factors of a compressed checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pipeline.cli import options


@click.command("recover")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@options.output
@click.option(
    "--text",
    default="",
    help="A text file, 'wikitext2+c4' from the hub, or 'self': text that the teacher generates. "
    "For rounded convolutions a folder of images, or scenes:DOMAIN:COUNT. Excludes --data.",
)
@click.option(
    "--data",
    help="Of rounded convolutions: labelled images, as `skipcat train` takes them, whose loss is "
    "trained; with --teacher beside the distance from its outputs. Excludes --text.",
)
@click.option(
    "--teacher",
    help="The original model: train towards its distribution instead of the text's next tokens.",
)
@click.option("--steps", type=options.positive, required=True, help="Steps of the optimizer.")
@options.setting("--lora-rank", 8, "Of the adapter of each factor.", options.positive)
@options.setting(
    "--lora-alpha", 16, "An adapter adds alpha / rank times its product.", options.positive
)
@options.setting(
    "--learning-rate",
    1e-4,
    "The highest: it rises over a tenth of the steps, then falls to 0 along a cosine.",
    options.rate,
)
@options.setting("--batch-size", 4, "Windows in a step.", options.positive)
@click.option(
    "--windows",
    type=options.positive,
    help="Windows to take, a tenth of them held out; by default as many as the steps read once.",
)
@options.setting("--window-length", 512, "Tokens in each window.", options.positive)
@click.option("--bfloat16", is_flag=True, help="Multiply in bfloat16; weights stay float32.")
@options.setting("--device", "cpu", "Where PyTorch trains: cpu, cuda, cuda:1.")
@options.seed
@options.trust_remote_code
@options.own_threads
@options.workers
@options.overwrite
@options.resume
@options.json_output
def command(
    checkpoint: Path,
    output: Path,
    workers: str | None,
    overwrite: bool,
    resume: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Win back some of what compression cost, at the same size.

    Adapters of low rank are trained on the factors and merged into them; the result is an ordinary
    compressed checkpoint. Rounded convolutions are trained as they are rounded, towards the outputs
    of the network that they were made from (--teacher), towards labels (--data), or both. A run
    that was interrupted continues with --resume and ends the same; one that diverged, with a
    smaller --learning-rate as well. With --workers others measure the held-out windows.

    \b
    skipcat recover small -o better --text train.txt --steps 500
    skipcat recover small -o better --text self --teacher smollm2-135m --steps 500
    skipcat recover int8 -o better --text images/ --teacher ./driving --steps 200 --batch-size 8
    skipcat recover int8 -o better --data bdd100k --teacher ./driving --steps 200 --batch-size 8
    """  # noqa: D301 - click reads the escape
    from pipeline.output import check_output

    kept = () if checkpoint.resolve() == output.resolve() else (checkpoint,)
    inputs = (*kept, settings["text"], settings["teacher"] or "", settings["data"] or "")
    check_output(output, overwrite=overwrite, inputs=inputs)  # before torch is loaded

    from pipeline.recover.recover import recover_to_folder
    from pipeline.recover.request import RecoverRequest
    from pipeline.workers.workers import open_workers

    request = RecoverRequest(checkpoint, **settings)
    with open_workers(workers) as own:
        recovery = recover_to_folder(
            request, output, overwrite=overwrite, resume=resume, workers=own
        )
    if as_json:
        click.echo(json.dumps(recovery, indent=2))
        return
    _show(recovery, output)


def _show(recovery: dict[str, Any], output: Path) -> None:
    """Print the losses before and after, and what comes next."""
    names = {"next_token": "cross entropy of the next token", "distillation": "KL to the teacher"}
    of_images = {
        "output_error": "error of the outputs, in parts of their variance",
        "label_loss": "loss of the labels",
    }
    found = of_images.keys() & recovery["loss"].keys()
    for name in found:
        loss = recovery["loss"][name]
        click.echo(
            f"{of_images[name]}: {loss['before']:.4g} before, {loss['after']:.4g} after, over "
            f"{recovery['held_out_windows']} images held out"
        )
    if found:
        click.echo(options.what_next(f"export {output} -o {output}-onnx"))
        return
    for name, loss in recovery["loss"].items():
        click.echo(
            f"{names[name]}: {loss['before']:.4f} before, {loss['after']:.4f} after, nats per "
            f"token over {recovery['held_out_windows']} windows held out"
        )
    click.echo(f"{output}: same ranks, same size")
    click.echo(options.what_next(f"export {output} -o {output}-onnx"))
