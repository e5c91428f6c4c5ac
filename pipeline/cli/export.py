"""`skipcat export`: a checkpoint in, an ONNX folder out."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pipeline.cli import options


@click.command("export")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@options.output
@click.option(
    "--profile",
    type=click.Choice(["opset24", "compat", "cpu"]),
    default="opset24",
    show_default=True,
    help="opset24: static cache, for ONNX Runtime >= 1.25 and TensorRT >= 10.15; "
    "compat: primitives and a growing cache, for TensorRT 10.0 and later (JetPack 6.2); "
    "cpu: ONNX Runtime's own operators, the fastest on a CPU.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="float32 for the CPU, float16 for TensorRT.",
)
@click.option(
    "--weights",
    type=click.Choice(["float", "int8", "int4", "int4-offset", "stored"]),
    help="How the graph holds the matrices (--weights of `skipcat compress` is a format). stored: "
    "the codes of a quantised checkpoint, the default where the runtime takes them. With "
    "--profile cpu also int8 (the default for others), which loses "
    "next to nothing, int4, which loses much, and int4-offset, which loses less and nothing of "
    "what was read from a GGUF file in 4 bits (the default for these); elsewhere they are as "
    "--dtype says.",
)
@click.option(
    "--products",
    type=click.Choice(["integer", "float"]),
    default="integer",
    show_default=True,
    help="With --profile cpu: integer rounds the inputs of products to 8 bits, which is fast; "
    "float does not, and shows what the graph alone costs.",
)
@click.option(
    "--max-length",
    type=int,
    default=2048,
    show_default=True,
    help="Length of the static cache: prompt and answer together.",
)
@options.overwrite
@options.json_output
def command(
    checkpoint: Path,
    output: Path,
    profile: str,
    dtype: str,
    weights: str | None,
    products: str,
    max_length: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Export one ONNX graph for prefill and decode, with genai_config.json beside it.

    Of an image classifier: one graph from pixel values to logits, any number of images at once.

    \b
    skipcat export small -o small-onnx
    skipcat export small -o small-onnx-fp16 --dtype float16
    skipcat export small -o small-onnx-cpu --profile cpu
    """  # noqa: D301 - click reads the escape
    from pipeline.artefact import refuse_existing

    refuse_existing(output, overwrite=overwrite)  # before torch and the model are loaded

    from pipeline.export.export import ExportRequest, export_folder

    request = ExportRequest(profile, dtype, max_length, weights, products)
    record = export_folder(checkpoint, output, request, overwrite=overwrite)
    if as_json:
        click.echo(json.dumps(record, indent=2))
        return
    images = "pixel_values" in record
    size = "x".join(map(str, record["pixel_values"])) if images else record["max_length"]
    total_bytes = record["graph_bytes"] + record["data_bytes"]
    click.echo(
        f"{output}: {profile} {dtype}, weights {record['weights']}, "
        f"{sum(record['nodes'].values())} nodes, "
        f"{record['block_skip_nodes']} block-skip, {total_bytes / 1e6:.1f} MB, "
        f"{size} {'pixels' if images else 'tokens'}; {record['seconds']:.0f} s"
    )
    click.echo(f"runs in: {record['runs_in']}")
    if images:
        click.echo(
            f"next: skipcat engine {output} -o engine   or   skipcat validate --onnx {output}"
        )
        return
    other = f"skipcat serve {output}" if profile == "cpu" else f"skipcat engine {output} -o engine"
    click.echo(f'next: skipcat run {output} -p "..."   or   {other}')
