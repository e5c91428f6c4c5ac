"""Models that flatter nobody: a model's function, or nearly so, with weights on no grid.

    python -m benchmarks.quality.subjects rotated smollm2-135m -o ROTATED
    python -m benchmarks.quality.subjects dithered smollm2-135m -o DITHERED

The default model came from a file of 4 bits, so that a format with that file's grid costs nothing.
Both are ordinary Hugging Face folders in float32, which every command takes as a model.

rotated: the gains of norms are folded, the residual stream is turned by a random orthogonal matrix
    and the heads of values by others: the same function, up to float32.
dithered: every weight is moved by up to half a step of its own block's grid, uniformly, within the
    block's range; the least and the greatest of a block stay. Rounding it to that format, as
    llama.cpp does, gives the model that it was made from.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import torch
from transformers import PreTrainedModel

from benchmarks.command import run
from pipeline.artefact import staged_folder, write_json
from pipeline.checkpoint.folder import save_checkpoint
from pipeline.compress.rotation import rotate_
from pipeline.errors import InputError
from pipeline.model.load import load_model
from pipeline.model.structure import decoder_structure
from pipeline.output import check_output
from pipeline.progress import note
from pipeline.provenance import provenance, public_name
from pipeline.quantize.rotations import random_rotation

_BLOCK = 32
# How far a weight of a file on a grid may be from it, in steps: float32 rounds its numbers.
_ON_GRID = 1e-3
# A little less than a half, so that nothing rounds to the neighbour.
_FARTHEST = 0.499


@click.command()
@click.argument("kind", type=click.Choice(["rotated", "dithered"]))
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--seed", type=int, default=0, show_default=True)
def command(kind: str, model: str, output: Path, seed: int) -> None:
    """Write MODEL rotated or dithered, as a Hugging Face folder in float32."""
    check_output(output, inputs=[model])
    loaded = load_model(model, dtype=torch.float32)
    told = {"rotated": _rotated_, "dithered": _dithered_}[kind](loaded.model, seed)
    with staged_folder(output, inputs=[model]) as folder:
        source = loaded.source.folder()
        save_checkpoint(loaded.model, loaded.tokenizer, {}, folder, torch.float32, source=source)
        record = {"schema": 1, "kind": kind, "model": public_name(model), "seed": seed, **told}
        write_json(folder / "subject.json", record | {"provenance": provenance()})
    click.echo(f"{output}: {loaded.source.label}, {kind}")


def _rotated_(model: PreTrainedModel, seed: int) -> dict[str, Any]:
    """Turn all that folds, by orthogonal matrices without any structure."""
    return rotate_(model, decoder_structure(model), "all", seed, random_rotation).describe()


@torch.no_grad()
def _dithered_(model: PreTrainedModel, seed: int) -> dict[str, Any]:
    """Move the weights of every matrix that lies on a known grid; those of others stay.

    Raises:
        InputError: none does.
    """
    generator = torch.Generator().manual_seed(seed)
    counts: dict[str, int] = {}
    for parameter in (p for p in model.parameters() if p.ndim == 2):
        moved, grid = parameter, "none"
        if parameter.shape[1] % _BLOCK == 0:
            moved, grid = dithered(parameter.data, generator)
        parameter.copy_(moved)
        counts[grid] = counts.get(grid, 0) + 1
    if set(counts) == {"none"}:
        raise InputError(
            "No matrix of the model lies on a grid that is known here.",
            where=public_name(model.name_or_path),
            expected="weights from GGUF's Q4_1 or Q8_0: blocks of 32",
            change="use the subject `rotated`",
        )
    note(f"matrices on each grid: {counts}")
    return {"matrices": counts}


def dithered(weight: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, str]:
    """Weights moved within half a step of their grid, and the grid's name.

    Args:
        weight: float32 [m, n], n a multiple of 32.
        generator: of the moves.

    Returns:
        Float32 [m, n]; "Q4_1", "Q8_0", or "none" where the weights are on neither and stay.
    """
    blocks = weight.reshape(len(weight), -1, _BLOCK)
    lowest, highest = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    reach = torch.maximum(highest, -lowest)
    sizes = blocks.abs()
    grids = {
        "Q4_1": (lowest, highest, 15, (blocks == lowest) | (blocks == highest)),
        "Q8_0": (-reach, reach, 254, sizes == reach),
    }
    for name, (low, high, steps, stays) in grids.items():
        step = (high - low) / steps
        places = (blocks - low) / step.clamp_min(1e-30)
        if float((places - places.round()).abs().max()) > _ON_GRID:
            continue
        drawn = 2 * torch.rand(blocks.shape, generator=generator) - 1
        moved = torch.minimum(torch.maximum(blocks + _FARTHEST * drawn * step, low), high)
        return torch.where(stays, blocks, moved).reshape(weight.shape), name
    return weight, "none"


if __name__ == "__main__":
    sys.exit(run(command))
