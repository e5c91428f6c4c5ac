"""What is read off the graph: convolutions, norms that fold, tensors that share a grid."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.errors import InputError
from pipeline.int8.structure import ConvStructure
from tests.support.convolutions import SIZE, seen_in_small_net


@pytest.fixture(scope="module")
def structure() -> ConvStructure:
    return seen_in_small_net()[0]


def test_every_convolution_is_found_with_its_norm(structure: ConvStructure) -> None:
    norms = {name: site.norm for name, site in structure.convs.items()}
    units = ("stem", "left", "right", "merge", "deep", "last")
    folded = {f"{name}.0": f"{name}.1" for name in units}
    assert norms == folded | {"plain": None, "boxes": None, "mask": None}
    assert structure.left_out == {}


def test_tensors_that_are_only_moved_share_a_grid(structure: ConvStructure) -> None:
    reads = {name: site.reads for name, site in structure.convs.items()}
    activations = structure.activations
    # left and right meet in a concatenation; `both` goes through a maximum and a concatenation
    assert activations["left.2"] == activations["right.2"] == reads["merge.0"]
    assert activations["merge.2"] == reads["deep.0"] == reads["last.0"] == activations["relu"]
    assert reads["left.0"] == reads["right.0"] == activations["stem.2"]
    assert reads["boxes"] == reads["mask"]
    assert len({reads["stem.0"], reads["left.0"], reads["merge.0"], reads["last.0"]}) == 4


def test_what_no_convolution_reads_has_no_grid(structure: ConvStructure) -> None:
    # The heads are outputs; `plain` is resized and summed, which is not only moving.
    for name in ("boxes", "mask", "plain", "last.0"):
        assert structure.convs[name].gives is None
    assert "last.2" in structure.activations


def test_what_a_convolution_reads_directly_is_told_from_what_was_moved(
    structure: ConvStructure,
) -> None:
    sources = {name: site.source for name, site in structure.convs.items()}
    assert sources["left.0"] == "stem.2"
    assert sources["plain"] == "deep.2"
    assert sources["stem.0"] is sources["merge.0"] is sources["deep.0"] is sources["last.0"] is None


def test_multiplications_are_counted(structure: ConvStructure) -> None:
    pixels = 2 * SIZE[0] * SIZE[1]  # of a batch
    assert structure.convs["stem.0"].macs == pixels * 8 * 3 * 9
    assert structure.convs["deep.0"].macs == pixels // 4 * 8 * 9


class _Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twice, self.first = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.mirrored = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")
        self.across = nn.ConvTranspose2d(3, 3, 1)
        self.norm, self.relu = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.first(x)
        x = self.norm(first) + first  # a norm that is not all that reads it
        return self.across(self.mirrored(self.twice(self.relu(self.twice(self.relu(x))))))


def test_what_cannot_be_rounded_is_named() -> None:
    structure = ConvStructure.of(_Odd().eval(), torch.rand(1, 3, 4, 4))
    assert list(structure.convs) == ["first"]
    assert structure.convs["first"].norm is None
    assert structure.left_out == {
        "twice": "called more than once",
        "mirrored": "padded with reflect",
        "across": "no nn.Conv2d of its own weight",
    }


class _ByValue(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if float(x.sum()) > 0 else -x


@pytest.mark.parametrize("model", [_ByValue(), nn.Linear(4, 4)])
def test_a_network_without_convolutions_is_refused(model: nn.Module) -> None:
    with pytest.raises(InputError, match="convolution"):
        ConvStructure.of(model.eval(), torch.rand(1, 3, 4, 4))
