"""Products of low-bit codes by themselves: our kernels against ONNX Runtime's, in turns.

    python -m benchmarks.cpu.products FOLDER... --json products.json

FOLDER is an export of `--profile cpu`. Its nodes of one shape, of all layers, are put into a graph
of their own: the node without the kernels is its function body. Medians of one run, and their
ratio. The matrices of a graph are read one after the other, as a token reads them, but they are
fewer, and a large cache may hold them.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper
from rich.table import Table

from benchmarks import RESULTS
from benchmarks.command import run
from pipeline.artefact import write_json
from pipeline.bench.measure import describe_machine, load_average
from pipeline.errors import UsageError
from pipeline.export.contract import GRAPH_FILE, MATMUL_BLOCKS
from pipeline.kernels.cpu_library import cpu_library, why_no_kernels
from pipeline.progress import note, result_console
from pipeline.provenance import provenance, public_name
from pipeline.runtime.sessions.onnx_graph import SPIN_US

_RESULT = RESULTS / "products.json"
_ROWS = (1, 4, 128)
_WAYS = ("kernel", "body")


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--threads", default=[1, 2], multiple=True, show_default=True)
@click.option("--turns", default=15, show_default=True, help="Of each way and number of rows.")
@click.option("--json", "result", type=click.Path(path_type=Path), default=_RESULT)
def command(folders: tuple[Path, ...], threads: list[int], turns: int, result: Path) -> None:
    """Time every shape of every folder; a row each, and the JSON after each."""
    if (reason := why_no_kernels()) is not None:
        raise UsageError("There are no kernels to measure here.", observed=reason)
    record: dict[str, Any] = {
        "schema": 1,
        "machine": describe_machine(),
        "provenance": provenance(),
        "turns": turns,
        "rows": [],
    }
    for folder in folders:
        model = onnx.load(folder / GRAPH_FILE)
        for nodes in _by_shape(model).values():
            graph = _graph_of(model, nodes)
            for number in threads:
                row = {"folder": public_name(folder), **_described(nodes), "threads": number}
                note(f"{row['folder']}: {row['rows']} x {row['columns']}, {number} threads")
                record["rows"].append(
                    row | _timed(graph, len(nodes), row["columns"], number, turns)
                )
                write_json(result, record)
    _show(record["rows"])


def _by_shape(model: onnx.ModelProto) -> dict[tuple[Any, ...], list[onnx.NodeProto]]:
    """Nodes of products of codes by operator, sizes and bits."""
    found = defaultdict(list)
    for node in model.graph.node:
        if node.op_type.startswith(MATMUL_BLOCKS):
            found[node.op_type, *sorted(_sizes(node).items())].append(node)
    return found


def _sizes(node: onnx.NodeProto) -> dict[str, int]:
    return {attribute.name: attribute.i for attribute in node.attribute}


def _described(nodes: list[onnx.NodeProto]) -> dict[str, Any]:
    sizes = _sizes(nodes[0])
    return {
        "operator": nodes[0].op_type,
        "nodes": len(nodes),
        "rows": sizes["N"],
        "columns": sizes["K"],
        "bits": sizes["bits"],
        "block": sizes["block_size"],
    }


def _graph_of(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> bytes:
    """A graph of some nodes alone, which all read one x."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    columns = _sizes(nodes[0])["K"]
    own, names = [], dict[str, None]()
    for place, node in enumerate(nodes):
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[0], copy.output[0] = "x", f"y{place}"
        own.append(copy)
        names |= dict.fromkeys(node.input[1:])
    values = [numpy_helper.from_array(numpy_helper.to_array(stored[n]), n) for n in names]
    graph = helper.make_graph(
        own,
        "products",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, "rows", columns])],
        [
            helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None)
            for node in own
        ],
        values,
    )
    alone = helper.make_model(
        graph,
        opset_imports=model.opset_import,
        functions=model.functions,
        ir_version=model.ir_version,
    )
    return bytes(alone.SerializeToString())


def _timed(graph: bytes, nodes: int, columns: int, threads: int, turns: int) -> dict[str, Any]:
    """Median microseconds of a node by both ways, in turns, for each number of rows of x."""
    sessions = {way: _session(graph, way, threads) for way in _WAYS}
    before, us, ratios = load_average(), {}, {}
    for rows in _ROWS:
        x = np.random.default_rng(rows).standard_normal((1, rows, columns)).astype(np.float32)
        seconds: dict[str, list[float]] = {way: [] for way in _WAYS}
        for turn in range(turns + 2):
            for way in _WAYS:
                begun = time.perf_counter()
                sessions[way].run(None, {"x": x})
                if turn > 1:  # the first two warm up
                    seconds[way].append(time.perf_counter() - begun)
        medians = {way: 1e6 * statistics.median(seconds[way]) / nodes for way in _WAYS}
        us[str(rows)] = {way: round(value, 2) for way, value in medians.items()}
        ratios[str(rows)] = round(medians["body"] / medians["kernel"], 3)
    return {"us": us, "times_as_fast": ratios, "load_average": [before, load_average()]}


def _session(graph: bytes, way: str, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    # As our sessions do: threads of one that go on spinning would take the other's cores.
    options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_US)
    library = cpu_library()
    if way == "kernel" and library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _show(rows: list[dict[str, Any]]) -> None:
    titles = [f"{rows} rows: us, x body" for rows in _ROWS]
    table = Table("folder", "N x K", "bits, block", "threads", *titles)
    for row in rows:
        cells = [
            f"{row['us'][str(n)]['kernel']:.1f}, {row['times_as_fast'][str(n)]:.2f}" for n in _ROWS
        ]
        shape, bits = f"{row['rows']} x {row['columns']}", f"{row['bits']}, {row['block']}"
        table.add_row(row["folder"], shape, bits, str(row["threads"]), *cells)
    result_console().print(table)


if __name__ == "__main__":
    sys.exit(run(command))
