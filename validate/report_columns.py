"""The numbers of a row as text, the same in the table and in the HTML page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.model.task import IMAGES
from validate.record import Ledger, Row

NOTHING = "-"


@dataclass(frozen=True)
class Column:
    """A column of the report.

    Attributes:
        title: its head.
        help: what the number means.
        text: the cell of a row.
    """

    title: str
    help: str
    text: Callable[[Row], str]


def cosine(row: Row) -> str:
    """Worst and mean cosine to the reference stage."""
    if row.closeness is None:
        return NOTHING
    metrics = row.closeness.metrics
    return f"{metrics.min_cosine:.7f} / {metrics.mean_cosine:.7f}"


def error(row: Row) -> str:
    """Largest and mean absolute error to the reference stage."""
    if row.closeness is None:
        return NOTHING
    metrics = row.closeness.metrics
    return f"{metrics.max_error:.2e} / {metrics.mean_error:.2e}"


def divergence(row: Row) -> str:
    """Mean KL to the original."""
    return NOTHING if row.to_original is None else f"{row.to_original.metrics.kl_mean:.2e}"


def top1(row: Row) -> str:
    """Top-1 agreement with the original."""
    return NOTHING if row.to_original is None else f"{row.to_original.metrics.top1_agreement:.1%}"


def greedy(row: Row) -> str:
    """Greedy agreement with the reference stage and with the original."""
    both = (row.greedy_to_reference, row.greedy_to_original)
    if all(one is None for one in both):
        return NOTHING
    return " / ".join(NOTHING if one is None else f"{one.identical_fraction:.0%}" for one in both)


def perplexity(row: Row) -> str:
    """Perplexity with its standard error."""
    if row.perplexity is None:
        return NOTHING
    if row.perplexity.standard_error is None:
        return f"{row.perplexity.value:.5g}"
    return f"{row.perplexity.value:.5g} ± {row.perplexity.standard_error:#.2g}"


def accuracy(row: Row) -> str:
    """Accuracy with its standard error."""
    if row.accuracy is None:
        return NOTHING
    return f"{row.accuracy.value:.2%} ± {row.accuracy.standard_error:.2%}"


def seconds(row: Row) -> str:
    """Seconds for everything."""
    return NOTHING if row.total_s is None else f"{row.total_s:.1f}"


COLUMNS = (
    Column("cosine", "Of the logits with those it should equal: worst token / mean.", cosine),
    Column("error", "Of the logits against those it should equal: largest / mean.", error),
    Column("KL orig.", "KL(original || stage), nats per token, mean.", divergence),
    Column("top-1", "Tokens whose likeliest successor is the original's.", top1),
    Column("greedy", "Tokens decoded alike: with what it should equal / the original.", greedy),
    Column("perplexity", "With its standard error, windows as independent units.", perplexity),
    Column("s", "Seconds for loading and all measurements.", seconds),
)


IMAGE_COLUMNS = (
    Column("cosine", "Of the logits with those it should equal: worst image / mean.", cosine),
    Column("error", "Of the logits against those it should equal: largest / mean.", error),
    Column("KL orig.", "KL(original || stage), nats an image, mean.", divergence),
    Column("top-1", "Images whose likeliest class is the original's.", top1),
    Column("accuracy", "Images classified as labelled, with its standard error.", accuracy),
    Column("s", "Seconds for loading and all measurements.", seconds),
)


def columns_of(ledger: Ledger) -> tuple[Column, ...]:
    """The columns of a ledger: of tokens, or of images."""
    return IMAGE_COLUMNS if ledger.inputs.get("task") == IMAGES else COLUMNS


def cells(row: Row, columns: tuple[Column, ...] = COLUMNS) -> list[str]:
    """The cells of some columns."""
    return [column.text(row) for column in columns]


def rounding_text(ledger: Ledger) -> str:
    """What is in few bits, and of the error of its outputs what rounding added; else empty."""
    found = ledger.rounding
    if found is None:
        return ""
    formats = ", ".join(f"{style} {count}" for style, count in found.formats.items())
    tables = ", ".join(f"{name} {style}" for name, style in found.tables.items())
    text = f"in few bits: {found.groups} of {found.all_groups} groups"
    text += f" ({formats})" if formats else ""
    text += f"; {tables}" if tables else ""
    if found.truncated is None or found.rounded is None:
        return text
    share = "" if found.share is None else f"; of it, rounding {found.share:.0%}"
    return (
        f"{text}. Mean relative error of their outputs when they were fitted: "
        f"{found.truncated:.2e} before rounding, {found.rounded:.2e} after{share}"
    )


def reference_text(row: Row) -> str:
    """The stage it should equal."""
    return row.reference or NOTHING
