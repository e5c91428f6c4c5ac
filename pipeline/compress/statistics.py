"""What a fit and a search need to know of a model, whatever its inputs are: tokens or images."""

from __future__ import annotations

from typing import Protocol

import torch

from pipeline.compress.bits import Noises
from pipeline.compress.search import Curves, Members


class GroupStatistics(Protocol):
    """Statistics of the linears of a model, by the names of linears that read the same input.

    `pipeline.compress.survey.Survey` has them of a decoder, `pipeline.vision.survey.ImageSurvey` of
    an image classifier.

    Attributes:
        curves: expected KL to the original, nats, of every stack at every rank from 0 to full.
        noises: what rounding is expected to add to it; empty where no formats were asked for.
    """

    curves: Curves
    noises: Noises

    def sensitivities(self, members: Members) -> list[torch.Tensor]:
        """Shrunk G = E[g g^T] of each member's output, float64 [m_i, m_i], of full rank."""
        ...

    def geometry(self, members: Members, moment: torch.Tensor) -> torch.Tensor:
        """What errors of the members are measured in.

        Args:
            members: that read the same input.
            moment: S of that input, float64 [n, n], in whichever model it was measured.

        Returns:
            float64 [n, n].
        """
        ...
