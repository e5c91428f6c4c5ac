"""`skipcat export`: a checkpoint in, an ONNX folder out."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pipeline.cli import options
from pipeline.export.contract import (
    CACHES,
    CPU,
    DEFAULT_MAX_LENGTH,
    DEFAULT_PROFILE,
    DTYPES,
    FLOAT,
    FLOAT32,
    INTEGER,
    PIXEL_VALUES,
    PRODUCTS,
    PROFILES,
    WEIGHTS,
)


@click.command("export")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@options.output
@options.setting(
    "--profile",
    DEFAULT_PROFILE,
    "; ".join(profile.help for profile in PROFILES.values()) + ".",
    click.Choice(list(PROFILES)),
)
@options.setting(
    "--dtype", FLOAT32, "float32 for the CPU, float16 for TensorRT.", click.Choice(DTYPES)
)
@click.option(
    "--weights",
    type=click.Choice(WEIGHTS),
    help="How the graph holds the matrices (--weights of `skipcat compress` is a format). stored: "
    "the codes of a quantised checkpoint, the default where the runtime takes them. With "
    "--profile cpu also int8 (the default for others), which loses "
    "next to nothing, int4, which loses much, and int4-offset, which loses less and nothing of "
    "what was read from a GGUF file in 4 bits (the default for these); elsewhere they are as "
    "--dtype says.",
)
@options.setting(
    "--products",
    INTEGER,
    "With --profile cpu: integer rounds the inputs of products to 8 bits, which is fast; "
    "float does not, and shows what the graph alone costs.",
    click.Choice(list(PRODUCTS)),
)
@options.setting(
    "--cache",
    FLOAT,
    "With --profile cpu: int8 holds keys and values in 8 bits, a quarter of float's bytes, by "
    "scales that are found by running the model.",
    click.Choice(CACHES),
)
@click.option(
    "--calibration",
    help="Of --cache int8: a text file, 'wikitext2+c4' from the hub, or 'self', text the model "
    "generates, which is the default; or several, joined by '+'.",
)
@options.setting(
    "--max-length",
    DEFAULT_MAX_LENGTH,
    "Length of the static cache: prompt and answer together.",
    options.positive,
)
@options.trust_remote_code
@options.own_threads
@options.overwrite
@options.json_output
def command(
    checkpoint: Path,
    output: Path,
    profile: str,
    dtype: str,
    weights: str | None,
    products: str,
    cache: str,
    calibration: str | None,
    max_length: int,
    trust_remote_code: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Export one ONNX graph for prefill and decode, with genai_config.json beside it.

    Of an image classifier: one graph from pixel values to logits, any number of images at once. Of
    a driving network: to its five maps, which are decoded outside.

    \b
    skipcat export small -o small-onnx
    skipcat export small -o small-onnx-fp16 --dtype float16
    skipcat export small -o small-onnx-cpu --profile cpu
    skipcat export small -o small-onnx-cpu8 --profile cpu --cache int8
    """  # noqa: D301 - click reads the escape
    from pipeline.output import check_output

    # Before torch and the model are loaded.
    check_output(output, overwrite=overwrite, inputs=(checkpoint,))

    from pipeline.export.export import export_folder
    from pipeline.export.request import ExportRequest
    from pipeline.model.task import TASKS

    request = ExportRequest(
        profile, dtype, max_length, weights, products, trust_remote_code, cache, calibration
    )
    record = export_folder(checkpoint, output, request, overwrite=overwrite)
    if as_json:
        click.echo(json.dumps(record, indent=2))
        return
    images = PIXEL_VALUES in record
    adapters = TASKS[record["task"]].adapters if images else {}
    size = "x".join(map(str, record[PIXEL_VALUES])) if images else record["max_length"]
    total_bytes = record["graph_bytes"] + record["data_bytes"]
    click.echo(
        f"{output}: {profile} {dtype}, weights {record['weights']}, "
        f"{sum(record['nodes'].values())} nodes, "
        f"{record['block_skip_nodes']} block-skip, {total_bytes / 1e6:.1f} MB, "
        f"{size} {'pixels' if images else 'tokens'}; {record['seconds']:.0f} s"
    )
    click.echo(f"runs in: {record['runs_in']}")
    if images:
        other = f"run {output} --image" if "look" in adapters else f"validate --onnx {output}"
        click.echo(options.what_next(f"engine {output} -o engine", other))
        return
    other = f"serve {output}" if profile == CPU else f"engine {output} -o engine"
    click.echo(options.what_next(f'run {output} -p "..."', other))
