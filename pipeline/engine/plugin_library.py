"""A plugin library: loaded into the registry, checked, and described for the manifest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artefact import sha256_of_file
from pipeline.errors import InputError
from pipeline.export.contract import BLOCK_SKIP, BLOCK_SKIP_OPS, DOMAIN, OP_VERSION

_PLUGIN_VERSION = str(OP_VERSION)
BUILT_PLUGIN = (
    Path(__file__).parents[2] / "trt_plugins" / "block_skip" / "lib" / "libskipcat_block_skip.so"
)


@dataclass(frozen=True)
class _PluginCreator:
    """What a registered plugin is found by."""

    name: str
    version: str
    namespace: str


def _require_plugin_file(path: Path) -> Path:
    """The absolute path of a plugin library; raise InputError when there is no such file."""
    if not path.is_file():
        raise InputError(
            "The plugin library is missing.",
            where=path,
            change="build it first (make plugin), or leave --plugin out",
        )
    return path.resolve()


def choose_plugin(given: Path | None) -> tuple[Path | None, str]:
    """The plugin library to build with, and what to say of it.

    Args:
        given: what the user named; None takes what `make plugin` built, if it did.

    Raises:
        InputError: the file that was named does not exist.
    """
    if given is not None:
        return _require_plugin_file(given), f"block-skip plugin: {given}"
    if BUILT_PLUGIN.is_file():
        return BUILT_PLUGIN, f"block-skip plugin: {BUILT_PLUGIN}, built by make plugin"
    return None, "no block-skip plugin: none is built (make plugin), so its function body is used"


def load_plugin(library: Any, path: Path) -> list[_PluginCreator]:
    """Load a plugin library into the registry and return the block-skip creators it brought.

    Args:
        library: the imported TensorRT module.
        path: the `.so`.

    Raises:
        InputError: it cannot be loaded, or brings no block-skip plugin.
    """
    registry = library.get_plugin_registry()
    if registry.load_library(str(path)) is None:
        raise InputError(
            "TensorRT cannot load this plugin library.",
            where=path,
            change="build it on this machine against the installed TensorRT; build.log says more",
        )
    found = [_describe(creator) for creator in registry.all_creators]
    ours = _block_skip_creators(found)
    if not ours:
        raise InputError(
            "This library has no block-skip plugin.",
            where=path,
            observed=", ".join(f"{item.namespace}::{item.name} {item.version}" for item in found),
            expected=f"{DOMAIN}::{BLOCK_SKIP} {_PLUGIN_VERSION}",
        )
    return ours


def _describe(creator: Any) -> _PluginCreator:
    """Name, version and namespace of a registered creator."""
    return _PluginCreator(creator.name, creator.plugin_version, creator.plugin_namespace)


def _block_skip_creators(creators: list[_PluginCreator]) -> list[_PluginCreator]:
    """Those that the graph's nodes resolve to; another namespace would be passed over silently."""
    return [
        creator
        for creator in creators
        if creator.name in BLOCK_SKIP_OPS
        and creator.namespace == DOMAIN
        and creator.version == _PLUGIN_VERSION
    ]


def plugin_record(path: Path) -> dict[str, Any]:
    """The manifest's description of the library the engine needs at run time."""
    return {
        "library": path.name,
        "names": list(BLOCK_SKIP_OPS),
        "sha256": sha256_of_file(path),
        "version": _PLUGIN_VERSION,
        "namespace": DOMAIN,
    }
