"""One stage of the pipeline, as the ledger sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tolerance:
    """What a stage must keep to; None leaves a quantity free.

    Attributes:
        min_cosine: least cosine, over the tokens, of its logits with those of its reference.
        max_relative_error: largest error against its reference over the largest reference logit.
        max_kl_to_reference: largest mean KL(reference || stage), nats per token. The cosine alone
            is a blunt test: noise that leaves 0.9994 changes 1 % of SmolLM2's top-1 choices.
        max_kl: largest mean KL(original || stage), nats per token.
    """

    min_cosine: float | None = None
    max_relative_error: float | None = None
    max_kl_to_reference: float | None = None
    max_kl: float | None = None

    @property
    def is_free(self) -> bool:
        """Whether nothing is demanded."""
        return self == Tolerance()

    @property
    def needs_reference(self) -> bool:
        """Whether it can be judged only against the reference stage."""
        demands = (self.min_cosine, self.max_relative_error, self.max_kl_to_reference)
        return any(demand is not None for demand in demands)


@dataclass(frozen=True)
class Stage:
    """A way to run the model.

    Attributes:
        name: unique within the ledger.
        open: loads it, a Session or, of an image classifier, an ImageSession; an exception of this
            makes the row 'not run'.
        reference: name of an earlier stage that it should equal; None for the original.
        tolerance: how nearly.
        required: whether 'not run' counts as a failure.
    """

    name: str
    open: Callable[[], Any]
    reference: str | None = None
    tolerance: Tolerance = Tolerance()
    required: bool = True
