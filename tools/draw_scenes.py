"""Draw the driving scenes that `make driving` trains and validates on, in BDD100K's own form.

python tools/draw_scenes.py -o scenes --scenes 2000   # scenes/wide and scenes/dense
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pipeline.artefact import staged_folder, write_json
from pipeline.driving.data import SPLITS, draw_scenes
from pipeline.errors import PipelineError
from pipeline.provenance import provenance

_SECOND_PART = 0.3  # of the first domain's scenes, those of the second
_VALIDATED = 160


def main(arguments: list[str] | None = None) -> int:
    """Draw both domains; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--scenes", type=int, default=2000, help="of the first domain, to train on")
    parser.add_argument("--validated", type=int, default=_VALIDATED, help="of each, to score on")
    parser.add_argument("--size", type=int, nargs=2, default=(192, 320), help="height and width")
    given = parser.parse_args(arguments)
    counts = {"wide": given.scenes, "dense": max(1, round(_SECOND_PART * given.scenes))}
    try:
        with staged_folder(given.output) as folder:
            for domain, count in counts.items():
                for split, number in zip(SPLITS, (count, given.validated), strict=True):
                    size = (given.size[0], given.size[1])
                    draw_scenes(f"scenes:{domain}:{number}", split, size, folder / domain)
            write_json(folder / "scenes.json", {"counts": counts, "provenance": provenance()})
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
