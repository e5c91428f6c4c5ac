"""`skipcat train`: train the driving network, stage by stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pipeline.cli import options

_DATA = (
    "scenes:DOMAIN:COUNT (wide or dense, drawn by seed), a folder laid out like BDD100K, or "
    "FOLDER:drivable=3,vehicle=8 with images/ and labels/ of class ids."
)


@click.command("train")
@options.output
@options.setting(
    "--stage",
    "all",
    "pretrain (with mosaic), finetune (without), mix (with the second set), or all in this order.",
    click.Choice(["all", "pretrain", "finetune", "mix"]),
)
@options.setting("--data", "scenes:wide:2000", "The first set: " + _DATA)
@options.setting("--second-data", "scenes:dense:600", "The second set, of the stage mix; likewise.")
@click.option(
    "-m",
    "--model",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Go on with a trained network; finetune and mix alone need one.",
)
@options.setting("--steps", 3600, "Of the optimizer, of all stages together.", options.positive)
@options.setting("--batch-size", 8, "Images in a step.", options.positive)
@options.setting(
    "--learning-rate",
    3e-3,
    "The highest, of the first stage; the others take 0.4 of it. Each falls along a cosine.",
    options.rate,
)
@options.setting(
    "--size", (192, 320), "Height and width of the input, multiples of 32.", click.Tuple([int, int])
)
@options.setting(
    "--width", 16, "Channels of the first convolution; 16 is 0.7M parameters.", options.positive
)
@options.setting("--scored", 160, "Images of each set to score a stage on.", options.positive)
@click.option(
    "--bfloat16",
    is_flag=True,
    help="Multiply in bfloat16; weights stay float32. Ten times slower on a CPU without AMX.",
)
@options.setting("--device", "cpu", "Where PyTorch trains: cpu, cuda, cuda:1.")
@options.seed
@options.own_threads
@options.overwrite
@options.resume
@options.json_output
def command(output: Path, overwrite: bool, resume: bool, as_json: bool, **settings: Any) -> None:
    """Train a network that finds vehicles, drivable area and lane lines.

    Without data it draws scenes. Each stage is scored on images that it was not trained on. A run
    that was interrupted continues with --resume, and ends on the CPU in the same bytes.

    \b
      skipcat train -o net
      skipcat train -o net --data bdd100k --second-data camvid:drivable=3,vehicle=8
      skipcat train -o better -m net --stage finetune --steps 500 --learning-rate 1e-3
    """  # noqa: D301 - click reads the escape
    from pipeline.output import check_output

    check_output(output, overwrite=overwrite, inputs=[settings["model"] or ""])

    from pipeline.driving.recipe import TrainRequest
    from pipeline.driving.train import train_to_folder

    record = train_to_folder(TrainRequest(**settings), output, overwrite=overwrite, resume=resume)
    if as_json:
        click.echo(json.dumps(record, indent=2))
        return
    click.echo("stage     set     images    AP50  drivable mIoU  lane IoU")
    for stage in record["stages"]:
        for name, found in stage["scores"].items():
            cells = [
                "-" if found["scores"][key] is None else f"{found['scores'][key]:.3f}"
                for key in ("ap50", "drivable_miou", "lane_iou")
            ]
            click.echo(
                f"{stage['name']:9} {name:7} {found['images']:6}  {cells[0]:>6}  {cells[1]:>13}"
                f"  {cells[2]:>8}"
            )
    click.echo(f"{output}: {record['parameters']:,} parameters, {record['seconds']:.0f} s")
