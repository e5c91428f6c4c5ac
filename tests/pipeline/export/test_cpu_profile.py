"""The profile `cpu`: the same numbers from ONNX Runtime's own operators, and few bits close by."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from pipeline.checkpoint.folder import load_checkpoint
from pipeline.compress.request import CompressRequest
from pipeline.compress.run import compress_to_folder
from pipeline.errors import UsageError
from pipeline.export.export import export_folder
from pipeline.export.request import ExportRequest
from pipeline.kernels.cpu_library import why_no_kernels
from pipeline.quantize.groupwise import quantize_blocks
from pipeline.runtime.generate import generate
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.sessions import onnx_graph
from pipeline.runtime.sessions.onnx_cpu_session import CpuSession
from tests.support.families import save_family

MAX_LENGTH = 48
# Plain ones; test_attention.py has windows, soft caps, sinks and heads of other widths.
FAMILIES = ("llama", "qwen2", "qwen3", "smollm")
# Of both kinds of attention; the others, and the dense ones, are slow.
QUICK = ("llama", "qwen3")
IDS = np.random.default_rng(0).integers(3, 250, size=(2, 17))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense and a compressed checkpoint of every family."""
    root = tmp_path_factory.mktemp("families")
    folders: dict[str, Path] = {}
    for family in FAMILIES:
        dense = save_family(root / f"{family}-dense", family, head_dim=16)
        request = CompressRequest(
            str(dense), 0.7, method="skipcat", windows=4, window_length=24, dtype="float32"
        )
        compress_to_folder(request, root / family)
        folders |= {f"{family} dense": dense, family: root / family}
    return folders


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of an export of a checkpoint, made once; not to be written to."""
    root = tmp_path_factory.mktemp("exports")

    def make(checkpoint: Path, weights: str | None = None, products: str = "integer") -> Path:
        folder = root / f"{checkpoint.name}-{weights}-{products}"
        if not folder.exists():
            request = ExportRequest("cpu", "float32", MAX_LENGTH, weights, products)
            export_folder(checkpoint, folder, request)
        return folder

    return make


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "export.json").read_text())
    return record


def torch_logits(folder: Path) -> np.ndarray:
    with torch.no_grad():
        model = load_checkpoint(folder, dtype=torch.float32)
        return model(torch.from_numpy(IDS)).logits.numpy()


def in_pieces(session: CpuSession, cuts: list[int]) -> np.ndarray:
    session.reset()
    pieces = np.split(IDS, cuts, axis=1)
    return np.concatenate([session.forward(piece) for piece in pieces], axis=1)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def optypes(folder: Path) -> list[str]:
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return [node.op_type for node in graph.node]


@pytest.mark.parametrize(
    "kind",
    [
        *(f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES),
        *(pytest.param(f"{f} dense", marks=pytest.mark.slow) for f in FAMILIES),
    ],
)
def test_in_float_prefill_and_decode_equal_torch(
    kind: str, checkpoints: dict[str, Path], exported: Callable[..., Path]
) -> None:
    folder = exported(checkpoints[kind], "float")
    record = record_of(folder)
    expected = torch_logits(checkpoints[kind])
    session = CpuSession(folder)
    for cuts in ([], [9], [5, 6, 7, 8], list(range(1, 17))):
        np.testing.assert_allclose(in_pieces(session, cuts), expected, rtol=2e-4, atol=2e-4)
    assert record["fused"]["SkipSimplifiedLayerNormalization"] == 4
    assert record["fused"]["first_logit"]


# Random layers pass every rounding on undamped, so 4 bits are not close; real models are closer.
@pytest.mark.parametrize(
    ("kind", "weights", "least"),
    [
        ("llama", "int4", 0.88),
        pytest.param("qwen2 dense", "int8", 0.998, marks=pytest.mark.slow),
        pytest.param("llama", "int8", 0.998, marks=pytest.mark.slow),
        pytest.param("llama dense", "int4", 0.88, marks=pytest.mark.slow),
        pytest.param("qwen2", "int4", 0.88, marks=pytest.mark.slow),
    ],
)
def test_few_bits_stay_close_to_torch(
    kind: str,
    weights: str,
    least: float,
    checkpoints: dict[str, Path],
    exported: Callable[..., Path],
) -> None:
    folder = exported(checkpoints[kind], weights)
    record = record_of(folder)
    logits = in_pieces(CpuSession(folder), [9, 10, 11])
    assert cosine(logits, torch_logits(checkpoints[kind])) > least
    assert "MatMul" not in optypes(folder)
    assert record["weights"] == weights
    assert sum(record["quantized"].values()) == matrices_of(optypes(folder))


def matrices_of(operators: list[str]) -> int:
    """How many matrices are codes: of a product, or of two in one node."""
    own = sum(name.startswith("MatMulBlocks") for name in operators)
    return own + 2 * sum(name.startswith("BlockSkipBlocks") for name in operators)


@pytest.mark.skipif(why_no_kernels() is not None, reason=str(why_no_kernels()))
@pytest.mark.parametrize(("kind", "weights"), [("llama", "int4"), ("llama", "int8")])
def test_the_bodies_give_the_logits_of_the_kernels(
    kind: str,
    weights: str,
    checkpoints: dict[str, Path],
    exported: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = exported(checkpoints[kind], weights)
    by_kernels = CpuSession(folder)
    monkeypatch.setattr(onnx_graph, "cpu_library", lambda: None)
    by_bodies = CpuSession(folder)
    assert by_kernels.name == f"onnxruntime cpu {weights}"
    assert by_bodies.name == f"onnxruntime cpu {weights}, function bodies"
    logits = [in_pieces(session, [9, 10, 11]) for session in (by_kernels, by_bodies)]
    # Inputs that lie between two codes of 8 bits may fall to either.
    assert cosine(*logits) > 0.9999


@pytest.mark.skipif(why_no_kernels() is not None, reason=str(why_no_kernels()))
def test_a_slot_that_decodes_alone_has_the_bits_it_has_beside_others(
    checkpoints: dict[str, Path], exported: Callable[..., Path]
) -> None:
    session = CpuSession(exported(checkpoints["llama"], "int4"), slots=3)
    for slot in range(3):
        session.prefill(slot, np.arange(4, 9 + slot))
    together = session.decode([0, 1, 2], [5, 6, 7])
    for slot in range(3):
        session.rewind_slot(slot, 5 + slot)
        assert np.array_equal(session.decode([slot], [5 + slot])[0], together[slot])


def on_grids(weight: torch.Tensor) -> torch.Tensor:
    """The matrix as a file in GGUF's Q4_1 would give it back."""
    blocks = quantize_blocks(weight.detach().numpy(), 4, 32, zero="offset")
    return torch.from_numpy(blocks.dequantized())


@pytest.fixture(scope="module")
def from_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint of a model whose layers have been in 4 bits with offsets."""
    folder = save_family(tmp_path_factory.mktemp("gguf") / "model", "llama", head_dim=16)
    model = load_checkpoint(folder, dtype=torch.float32)
    with torch.no_grad():
        for module in model.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(on_grids(module.weight))
    model.save_pretrained(folder)
    return folder


def test_weights_that_are_on_grids_of_4_bits_are_stored_in_4_bits_and_it_is_said(
    from_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = export_folder(from_gguf, tmp_path / "onnx", ExportRequest("cpu", max_length=48))
    assert (record["weights"], record["exact_weights"]) == ("int4-offset", True)
    assert set(record["quantized"]) == {"MatMulBlocks 4", "MatMulBlocks 8"}  # 8: the head
    assert "4 bits round nothing" in capsys.readouterr().err
    logits = in_pieces(CpuSession(tmp_path / "onnx"), [9, 10, 11])
    assert cosine(logits, torch_logits(from_gguf)) > 0.999


def test_4_bits_with_offsets_round_nothing_but_the_head(
    from_gguf: Path, exported: Callable[..., Path]
) -> None:
    """In float products, against a model whose head is what 8 bits stand for."""
    folder = exported(from_gguf, products="float")
    model = load_checkpoint(from_gguf, dtype=torch.float32)
    tables = [model.get_output_embeddings()]
    if model.config.tie_word_embeddings:
        tables.append(model.get_input_embeddings())
    with torch.no_grad():
        for table in tables:
            blocks = quantize_blocks(table.weight.detach().numpy(), 8, 64, zero="sym")
            table.weight = torch.nn.Parameter(torch.from_numpy(blocks.dequantized()))
        expected = model(torch.from_numpy(IDS)).logits.numpy()
    found = in_pieces(CpuSession(folder), [9, 10, 11])
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("weights", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_what_is_asked_for_goes_before_what_rounds_nothing(
    weights: str, from_gguf: Path, tmp_path: Path
) -> None:
    request = ExportRequest("cpu", max_length=48, weights=weights)
    record = export_folder(from_gguf, tmp_path / "onnx", request)
    assert (record["weights"], record["exact_weights"]) == (weights, False)


def test_other_weights_are_not_taken_for_such(
    checkpoints: dict[str, Path], exported: Callable[..., Path]
) -> None:
    source = checkpoints["llama dense"]
    record = record_of(exported(source))
    assert (record["weights"], record["exact_weights"]) == ("int8", False)
    record = record_of(exported(source, "int4-offset"))
    assert (record["weights"], record["exact_weights"]) == ("int4-offset", False)
    logits = in_pieces(CpuSession(exported(source, "int4-offset")), [9, 10, 11])
    assert cosine(logits, torch_logits(source)) > 0.88


def test_the_sums_of_an_input_are_computed_once_for_all_products(
    from_gguf: Path, exported: Callable[..., Path]
) -> None:
    folder = exported(from_gguf, products="float")
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    products = Counter(n.input[0] for n in graph.node if n.op_type == "MatMulNBits")
    sums = Counter(n.input[0] for n in graph.node if ".sums." in n.name)
    assert max(products.values()) > 1
    assert set(sums.values()) == {1}


def test_a_tied_embedding_is_read_from_the_heads_codes(
    checkpoints: dict[str, Path], exported: Callable[..., Path]
) -> None:
    folder = exported(checkpoints["llama dense"])
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    config = json.loads((folder / "config.json").read_text())
    nodes = {node.op_type: node for node in graph.node}
    if config["tie_word_embeddings"]:
        head = next(n for n in graph.node if "logits" in n.output)
        assert nodes["LookUpBlocks"].input[1] == head.input[1]
    else:
        assert "LookUpBlocks" not in nodes


def test_logits_of_the_last_token_alone_are_those_of_the_last_token(
    checkpoints: dict[str, Path], exported: Callable[..., Path]
) -> None:
    session = CpuSession(exported(checkpoints["llama"], "float"))
    every = session.forward(IDS)
    session.reset()
    last = session.forward(IDS, last_only=True)
    assert last.shape == (2, 1, every.shape[2])
    np.testing.assert_allclose(last, every[:, -1:], rtol=1e-4, atol=1e-5)


def test_a_runtime_that_knows_nothing_of_first_logit_gets_all_logits(
    checkpoints: dict[str, Path], exported: Callable[..., Path]
) -> None:
    folder = exported(checkpoints["llama"], "float")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    positions = np.broadcast_to(np.arange(IDS.shape[1]), IDS.shape)
    feeds = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "position_ids": positions}
    shapes = {node.name: node.shape for node in session.get_inputs()}
    for name, shape in shapes.items():
        if name.startswith("past"):
            feeds[name] = np.zeros((2, shape[1], 0, shape[3]), np.float32)
    logits = session.run(["logits"], {name: feeds[name] for name in shapes if name in feeds})[0]
    expected = torch_logits(checkpoints["llama"])
    np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("request_", "flag"),
    [
        (ExportRequest("opset24", weights="int8"), "--profile cpu"),
        (ExportRequest("cpu", dtype="float16"), "--dtype"),
        (ExportRequest("cpu", weights="int3"), "int8"),
    ],
)
def test_what_the_profile_cannot_store_is_refused(request_: ExportRequest, flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        request_.check()


@pytest.mark.parametrize(
    ("weights", "cache"),
    [
        pytest.param("float", "float", marks=pytest.mark.slow),
        ("int8", "float"),
        ("float", "int8"),
    ],
)
def test_onnxruntime_genai_runs_the_folder_as_it_is(
    tmp_path: Path, weights: str, cache: str
) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    source = save_family(tmp_path / "llama", "llama", head_dim=16)
    folder = tmp_path / "onnx"
    wanted = ExportRequest("cpu", max_length=MAX_LENGTH, weights=weights, cache=cache)
    export_folder(source, folder, wanted)
    settings = json.loads((folder / "genai_config.json").read_text())
    settings["model"]["eos_token_id"] = 271  # its generator ends there; ours goes on
    (folder / "genai_config.json").write_text(json.dumps(settings))
    prompt = IDS[0, :9]
    expected = list(generate(CpuSession(folder), prompt.tolist(), Decoding(12)))
    parameters = genai.GeneratorParams(model := genai.Model(str(folder)))
    parameters.set_search_options(do_sample=False, max_length=21)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    written = generator.get_sequence(0)[9:].tolist()
    assert len(written) > 3
    assert written == expected[: len(written)]
