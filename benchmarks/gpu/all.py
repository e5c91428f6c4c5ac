"""Everything that a GPU has to show, by one command in a given time, what is worth most first.

python benchmarks/gpu/all.py --minutes 8            # on a GPU; writes results/gpu.json
python benchmarks/gpu/all.py --dry                # anywhere: every step on tiny layers, emulated
python benchmarks/gpu/all.py --prepare            # anywhere: compiles, to spare device time

The file is written after every row, and holds a part for each card; called again with the same
file, it goes on with what is missing. Steps run in a child that is ended when its time is over, and
replaced when it fails. `steps.py` has the steps, their order, and their seconds.

Of a lent machine (one GPU, ten minutes, start included, nothing within reach; its image has nvcc,
compute-sanitizer, PyTorch and pytest) the tool `run` is given, after `--prepare` here,

    command: python3 benchmarks/gpu/all.py --minutes 8 --json $OUT/gpu.json
    carry: build/gpu, build/plugin/tree/harness, trt_plugins/block_skip/lib
    timeout_s: 600

and a second time, with the file in the checkout, `cp FILE $OUT/gpu.json; ` before it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if not __package__:  # run as a file: once more, as the module that it is
    _paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _paths))
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu.all", *sys.argv[1:]])

from benchmarks.command import run  # found only as a module
from benchmarks.gpu.run_steps import command

if __name__ == "__main__":
    sys.exit(run(command))
