"""`skipcat compress`: a model in, a compressed checkpoint out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pipeline.cli import options
from pipeline.compress.methods import DEFAULT_EFFORT, DEFAULT_METHOD, EFFORTS, METHODS
from pipeline.quantize.formats import DEFAULT_RUNTIME, RUNTIMES

calibration_options = options.apply(
    click.option(
        "--keep-params",
        type=float,
        default=0.8,
        show_default=True,
        help="Fraction of the decoder's linear parameters to keep, in (0, 1].",
    ),
    click.option(
        "--effort",
        type=click.Choice(list(EFFORTS)),
        default=DEFAULT_EFFORT,
        show_default=True,
        help="Minutes against quality: how much text is read, and how layers are fitted.",
    ),
    click.option(
        "--method",
        type=click.Choice(list(METHODS)),
        default=DEFAULT_METHOD,
        show_default=True,
        help="; ".join(f"{name}: {method.summary}" for name, method in METHODS.items()) + ".",
    ),
    click.option(
        "--cat/--no-cat", default=True, help="Let q,k,v and gate,up share their right factor."
    ),
    click.option("--skip/--no-skip", default=True, help="Store factors in block-skip form."),
    click.option("--one-sided", is_flag=True, help="Weigh all outputs of a matrix alike."),
    click.option(
        "--one-shot", is_flag=True, help="Fit layers to the original's inputs, whatever the effort."
    ),
    click.option(
        "--mix",
        type=float,
        help="Share of the original's output in the targets of layers; by default the effort's.",
    ),
    click.option("--rank-multiple", type=int, default=1, help="Make ranks multiples of this."),
    click.option("--plan", type=click.Path(exists=True), help="Follow this plan.json."),
    click.option(
        "--calibration",
        default="self",
        show_default=True,
        help="A text file, 'wikitext2+c4' from the hub, 'self': text the model generates; or "
        "several, joined by '+'. For an image classifier a folder of images, or a .npz, .npy or "
        ".safetensors of arrays.",
    ),
    click.option(
        "--windows", type=int, help="Of calibration text, or images; by default the effort's."
    ),
    click.option("--window-length", type=int, help="Tokens in each; by default the effort's."),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
        default="auto",
        help="Of the weights on disk; auto: as published (float16 for GGUF).",
    ),
    click.option(
        "--stream-weights",
        is_flag=True,
        help="Leave the weights in their files, as published, even where memory has room for "
        "them in float32; a model that is too large for that is streamed without asking.",
    ),
)

bits_options = options.apply(
    click.option(
        "--memory",
        help="Bytes that all weights may take, such as 60MB: ranks and bits are searched together, "
        "and --keep-params is not looked at.",
    ),
    click.option(
        "--keep-bytes",
        type=float,
        help="The same, as a fraction of the model's bytes in float16.",
    ),
    click.option(
        "--runtime",
        type=click.Choice(list(RUNTIMES)),
        default=DEFAULT_RUNTIME,
        show_default=True,
        help="Whose formats may be used, and in whose file bytes are counted: "
        + "; ".join(f"{name}: {runtime.takes}" for name, runtime in RUNTIMES.items())
        + ".",
    ),
    click.option(
        "--weights", help="One format for all matrices of the layers, such as int8-b64-sym."
    ),
    click.option("--table", help="One for the embedding and the head, such as int4-b32-asym."),
    click.option(
        "--balance",
        type=float,
        default=0.0,
        show_default=True,
        help="Scale the channels that norms feed by this power of their size, in [0, 1]: outliers "
        "go from the inputs into the weights.",
    ),
)


@click.command("compress")
@options.model
@options.output
@calibration_options
@bits_options
@options.seed
@options.trust_remote_code
@options.overwrite
@options.resume
@options.dry_run
@options.json_output
def command(
    output: Path, overwrite: bool, resume: bool, dry_run: bool, as_json: bool, **settings: Any
) -> None:
    """Factor the linear layers of a decoder or image classifier; transformers loads the result.

    \b
    skipcat compress -m smollm2-135m -o small --keep-params 0.8
    skipcat compress -m ./my-llama -o small --calibration valid.txt --windows 64 --window-length 512
    skipcat compress -m smollm2-135m -o small --memory 60MB
    skipcat compress -m ./my-vit -o small --keep-params 0.6 --calibration images/
    """  # noqa: D301 - click reads the escape
    from pipeline.artefact import refuse_existing
    from pipeline.compress.request import CompressRequest
    from pipeline.compress.run import compress_to_folder

    request = CompressRequest(**settings)
    request.check()
    if dry_run:
        _show_plan(request, as_json)
        return
    refuse_existing(output, overwrite=overwrite)  # before the model is loaded
    report = compress_to_folder(request, output, overwrite=overwrite, resume=resume)
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    totals = report["totals"]
    click.echo(f"{output}: {totals['kept_fraction']:.1%} of the linear parameters kept")
    click.echo(
        f"{totals['total_before']:,} parameters before, {totals['total_after']:,} after; "
        f"{totals['factored']} groups factored, {totals['kept_dense']} kept dense; "
        f"largest |A'| {totals['largest']:.3f}"
    )
    if totals["in_few_bits"]:
        click.echo(f"{totals['stored_bytes'] / 1e6:.2f} MB of weights on disk")
    for group in report["groups"]:
        if group.get("reason"):
            click.echo(f"dense: {', '.join(group['members'])}: {group['reason']}")
    click.echo(f"next: skipcat export {output} -o {output}-onnx")


def _show_plan(request: Any, as_json: bool) -> None:
    """What would be done: every group with its shape, rank and parameters.

    A method that searches its plan has to measure the model first, which takes most of its time.
    """
    from rich.table import Table

    from pipeline.compress.run import plan_only
    from pipeline.progress import result_console

    plan = plan_only(request)
    if as_json:
        groups = [vars(g) | {"kept_parameters": g.kept_parameters} for g in plan.groups]
        click.echo(json.dumps({"kept_fraction": plan.kept_fraction, "groups": groups}, indent=2))
        return
    table = Table(title=f"{request.model}: {plan.kept_fraction:.2%} would be kept")
    for heading in ("members", "m x n", "form", "rank", "few bits", "parameters", "after"):
        table.add_column(heading)
    for group in plan.groups:
        table.add_row(
            "\n".join(group.members),
            f"{group.rows} x {group.columns}",
            group.form,
            str(group.rank),
            " ".join(style or "-" for style in (group.down_style, group.up_style)),
            f"{group.dense_parameters:,}",
            f"{group.kept_parameters:,}",
        )
    result_console().print(table)
