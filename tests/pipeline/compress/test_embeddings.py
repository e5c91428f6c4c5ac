"""The embedding and the head in few bits: measured one by one, and stored as they are shared."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from pipeline.checkpoint.modeling_quantized import QuantizedEmbedding, QuantizedLinear
from pipeline.compress.embeddings import _WINDOWS, Embeddings, _entries, _gptq
from pipeline.compress.factorize.factors import GPTQ, rtn
from pipeline.quantize.formats import RUNTIMES, Format
from pipeline.quantize.groupwise import Blocks
from tests.support.families import tiny_model

TOKENS = torch.randint(3, 250, (8, 24), generator=torch.Generator().manual_seed(0))
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
STYLE = "int4-b16-asym"


@torch.no_grad()
def log_chances(model: PreTrainedModel) -> torch.Tensor:
    return model(TOKENS).logits.log_softmax(-1)


@pytest.mark.parametrize(("family", "groups"), [("smollm", 1), ("llama", 2)])
def test_every_format_is_measured_and_the_model_is_as_it_was(family: str, groups: int) -> None:
    model, runtime = tiny_model(family), RUNTIMES["any"]
    before = log_chances(model)
    choices = Embeddings(model).choices(TOKENS, runtime)
    assert torch.equal(log_chances(model), before)
    assert len(choices) == groups
    for every in choices:
        assert len(every) == 1 + len(runtime.table)
        whole, *few = every
        assert (whole.embeddings, whole.loss) == ({}, 0.0)
        assert 0 < few[0].stored_bytes < whole.stored_bytes
        assert few[0].loss > few[-1].loss > 0  # 2 bits against 8


def test_the_cost_of_a_format_is_the_kl_to_the_model_as_it_is() -> None:
    model = tiny_model("smollm")
    windows = TOKENS[:_WINDOWS]
    choice = Embeddings(model).choices(TOKENS, RUNTIMES["any"])[0][1]
    with torch.no_grad():
        before = model(windows).logits.log_softmax(-1)
        Embeddings(model).quantize_(choice.embeddings, TOKENS, GPTQ)
        after = model(windows).logits.log_softmax(-1)
    expected = (before.exp() * (before - after)).sum(-1).mean()
    assert choice.loss == pytest.approx(float(expected), rel=1e-4)


def test_a_tied_matrix_is_rounded_once_and_read_by_both() -> None:
    model = tiny_model("smollm")
    entries, tensors = Embeddings(model).quantize_(
        dict.fromkeys((EMBEDDING, HEAD), STYLE), TOKENS, GPTQ
    )
    assert {name: entry["form"] for name, entry in entries.items()} == {
        EMBEDDING: "table",
        HEAD: "head",
    }
    assert {name.rpartition(".")[0] for name in tensors} == {f"{EMBEDDING}.stored"}
    head, table = model.get_submodule(HEAD), model.get_submodule(EMBEDDING)
    assert isinstance(head, QuantizedLinear)
    assert isinstance(table, QuantizedEmbedding)
    assert head.matrix is table.stored


def test_an_untied_head_feeds_errors_forward_and_an_embedding_does_not() -> None:
    model, style = tiny_model("llama"), Format.parse("int3-b16-asym")
    embedding, head = (model.get_submodule(n).weight.detach().clone() for n in (EMBEDDING, HEAD))
    x = model.model(TOKENS).last_hidden_state.flatten(0, 1).detach().double()

    def lost(codes: Blocks) -> float:
        return float((x @ (codes.values() - head.double()).T).square().sum())

    assert lost(_gptq(model, (HEAD,), style, TOKENS)) < 0.8 * lost(rtn(head, style))
    plain = rtn(embedding, style).values()
    assert torch.equal(_gptq(model, (EMBEDDING,), style, TOKENS).values(), plain)


def test_a_format_for_one_of_them_leaves_the_other_as_it_is() -> None:
    model = tiny_model("llama")
    entries, _ = Embeddings(model).quantize_({HEAD: STYLE}, TOKENS, GPTQ)
    assert list(entries) == [HEAD]
    assert isinstance(model.get_submodule(EMBEDDING), torch.nn.Embedding)


def test_a_tied_table_pays_on_the_cpu_for_scales_and_zeros_in_two_shapes() -> None:
    model = tiny_model("smollm")
    choices = Embeddings(model).choices(TOKENS[:1], RUNTIMES["cpu"])[0][1:]
    rows, columns = model.get_submodule(EMBEDDING).weight.shape
    for choice, style in zip(choices, RUNTIMES["cpu"].table, strict=True):
        twice = rows * style.blocks(columns) * (4 if style.symmetric else 5)
        assert choice.stored_bytes >= style.stored_bytes(rows, columns, 4) + twice


def test_formats_that_the_runtime_takes_no_such_width_in_are_no_choice() -> None:
    model = tiny_model("smollm")
    taken = Embeddings(model).choices(TOKENS[:1], RUNTIMES["tensorrt"])[0]
    assert [set(choice.embeddings.values()) for choice in taken] == [set(), {"int8-row-sym"}]


@pytest.mark.parametrize("family", ["smollm", "llama"])
def test_the_tables_of_a_model_are_found_by_asking_it(family: str) -> None:
    found = Embeddings(tiny_model(family))
    assert (found.embedding, found.head) == (EMBEDDING, HEAD)
    assert found.groups == (((EMBEDDING, HEAD),) if family == "smollm" else ((EMBEDDING,), (HEAD,)))


def test_entries_of_a_shared_matrix_name_its_owner_first() -> None:
    entries = _entries(tiny_model("smollm"), (EMBEDDING, HEAD), Format.parse(STYLE))
    assert list(entries) == [EMBEDDING, HEAD]
    assert [entry["owner"] for entry in entries.values()] == [None, EMBEDDING]
