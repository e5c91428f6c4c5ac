"""The embedding and the LM head of a language model, found by asking the model for them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class _Embeddings:
    """Matrices outside the decoder's layers that are as wide as the vocabulary.

    Attributes:
        embedding: dotted name; None where it is no plain nn.Embedding.
        head: dotted name; None where it is no plain nn.Linear.
        tied: both are one matrix.
    """

    embedding: str | None
    head: str | None
    tied: bool

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Names of the modules that are stored together, the owner of the matrix first."""
        if self.tied:
            both = (self.embedding, self.head)
            return () if None in both else (tuple(str(name) for name in both),)
        return tuple((name,) for name in (self.embedding, self.head) if name is not None)


def find_embeddings(model: PreTrainedModel) -> _Embeddings:
    """Names of the embedding and the LM head of a model."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = (
        embedding is not None
        and head is not None
        and getattr(embedding, "weight", None) is getattr(head, "weight", 0)
    )
    return _Embeddings(
        names[id(embedding)] if type(embedding) is nn.Embedding else None,
        names[id(head)] if type(head) is nn.Linear else None,
        tied,
    )
