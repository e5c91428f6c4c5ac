"""Which path nodes took is read off the layers, and one that was not asked for is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.engine.paths import (
    _block_skip_path,
    _BlockSkipPath,
    _embedded_path,
    _latent_path,
    paths_taken,
)
from pipeline.engine.worker_protocol import WorkerRequest
from pipeline.errors import InputError


def cache_request(**changes: Any) -> WorkerRequest:
    """A graph with four nodes that write the cache."""
    return WorkerRequest(
        flavour="tensorrt",
        compute_capability=(8, 7),
        onnx_path=Path("model.onnx"),
        profiles=(),
        shared_weights=True,
        workspace_bytes=None,
        onnx_profile="compat-static",
        cache_nodes=4,
        **changes,
    )


def test_as_many_plugin_layers_as_nodes_is_the_plugin_path() -> None:
    path = _block_skip_path({"PLUGIN_V3": 7, "CONSTANT": 3}, 7, plugin_wanted=True)
    assert path == _BlockSkipPath("plugin", 7)


def test_no_plugin_layer_is_the_function_body() -> None:
    path = _block_skip_path({"MATRIX_MULTIPLY": 14}, 7, plugin_wanted=False)
    assert path == _BlockSkipPath("function body", 7)


def test_a_graph_without_nodes_takes_neither_path() -> None:
    assert _block_skip_path({"MATRIX_MULTIPLY": 14}, 0, plugin_wanted=False).path == "none"


@pytest.mark.parametrize("plugin_layers", [1, 6, 8])
def test_a_partial_plugin_path_is_refused(plugin_layers: int) -> None:
    with pytest.raises(InputError, match="part"):
        _block_skip_path({"PLUGIN_V3": plugin_layers}, 7, plugin_wanted=True)


@pytest.mark.parametrize("nodes", [0, 7])
def test_a_plugin_that_no_node_took_is_refused(nodes: int) -> None:
    with pytest.raises(InputError, match="no node"):
        _block_skip_path({"MATRIX_MULTIPLY": 14}, nodes, plugin_wanted=True)


def test_attention_to_latents_by_a_plugin_is_told_from_block_skip() -> None:
    both, alone = {"PLUGIN_V3": 9}, {"PLUGIN_V3": 7}
    for layers, path in ((both, "plugin"), (alone, "function body")):
        found = _block_skip_path(layers, 7, plugin_wanted=True, latent_nodes=2)
        assert found == _BlockSkipPath("plugin", 7)
        assert _latent_path(layers, 2, 7) == {"nodes": 2, "path": path}
    assert _block_skip_path({"PLUGIN_V3": 2}, 0, True, 2) == _BlockSkipPath("none", 0)
    assert _latent_path({}, 0, 0) == {"nodes": 0, "path": "none"}
    with pytest.raises(InputError, match="part"):
        _block_skip_path({"PLUGIN_V3": 8}, 7, plugin_wanted=True, latent_nodes=2)


def test_nodes_that_write_the_cache_are_told_from_the_others() -> None:
    request = cache_request(block_skip_nodes=7, plugin=Path("plugin.so"))
    taken = paths_taken(request, {"PLUGIN_V3": 11})
    assert taken["cache_write"] == {"nodes": 4, "path": "plugin"}
    assert taken["block_skip"] == {"path": "plugin", "nodes": 7}
    with pytest.raises(InputError, match="no node"):
        paths_taken(request, {"PLUGIN_V3": 4})
    with pytest.raises(InputError, match="part"):
        paths_taken(request, {"PLUGIN_V3": 10})
    with pytest.raises(InputError, match="that write the cache did not take") as caught:
        paths_taken(request, {"PLUGIN_V3": 3})
    assert "--profile compat" in str(caught.value)
    # A library that has nothing else to do, and none at all.
    alone = paths_taken(cache_request(block_skip_nodes=0, plugin=Path("x")), {"PLUGIN_V3": 4})
    assert (alone["cache_write"]["nodes"], alone["block_skip"]["path"]) == (4, "none")
    assert paths_taken(cache_request(block_skip_nodes=7, plugin=None), {})["cache_write"] == {}


def test_two_plugin_layers_for_each_node_are_embedded_kernels() -> None:
    assert _embedded_path({"PLUGIN_V3": 14}, 7) == _BlockSkipPath("embedded kernels", 7)
    assert _embedded_path({}, 0) == _BlockSkipPath("none", 0)


@pytest.mark.parametrize("layers", [0, 7, 13, 15])
def test_a_node_that_was_not_embedded_is_refused(layers: int) -> None:
    with pytest.raises(InputError, match="embedded"):
        _embedded_path({"PLUGIN_V3": layers}, 7)
