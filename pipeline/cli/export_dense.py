"""`skipcat export-dense`: a compressed checkpoint as an ordinary dense model."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.cli import options


@click.command("export-dense")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@options.output
@options.trust_remote_code
@options.own_threads
@options.overwrite
def command(checkpoint: Path, output: Path, trust_remote_code: bool, overwrite: bool) -> None:
    """Multiply the factors out, for tools that know nothing of skipcat.

    The result is as large as the original and loads in transformers, vLLM, llama.cpp's converter,
    lm-evaluation-harness and anything else that knows the architecture.
    """
    from pipeline.artefact import staged_folder
    from pipeline.output import check_output

    inputs = (checkpoint,)
    check_output(output, overwrite=overwrite, inputs=inputs)  # before torch is loaded

    from pipeline.checkpoint.dense import dense_bytes, export_dense

    needed_bytes = dense_bytes(checkpoint)
    with staged_folder(
        output, overwrite=overwrite, inputs=inputs, required_bytes=needed_bytes
    ) as folder:
        export_dense(checkpoint, folder, trust_remote_code=trust_remote_code)
    click.echo(f"{output}: dense weights, same architecture, same outputs")
