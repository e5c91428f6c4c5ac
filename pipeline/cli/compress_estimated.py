"""`skipcat compress --estimate`: hours, memory, bytes moved and disk, before they are needed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from pipeline.bench.shapes import find_shape, is_shape
from pipeline.compress.request import CompressRequest
from pipeline.machine import allowed_threads, product_threads
from pipeline.model.load import preview_model
from pipeline.model.task import TEXT, adapter_of, refuse_other_tasks, task_of_model


def show_estimate(request: CompressRequest, workers: int, as_json: bool) -> None:
    """Print what compressing would take, from one layer that is timed here.

    Args:
        request: how; its model may be a shape's name.
        workers: that would compute tasks; 0 for this process alone.
        as_json: print an object in place of lines.

    Raises:
        InputError: no language model.
        UsageError: a method that cannot be estimated.
    """
    named = is_shape(request.model) and not Path(request.model).exists()
    if named:
        config = find_shape(request.model).config()
    else:
        refuse_other_tasks(task_of_model(request.model), request.model)
        config = preview_model(request.model, trust_remote_code=request.trust_remote_code).config
    threads = (allowed_threads() or 1) if workers else product_threads()
    found = adapter_of(TEXT, "estimate")(config, request, workers, threads)
    if as_json:
        click.echo(json.dumps({"model": request.model, "effort": request.effort} | asdict(found)))
        return
    by = f"{workers} workers of {threads} thread{'s' * (threads != 1)}" if workers else "no workers"
    click.echo(f"{request.model}, effort {request.effort}, {by}: about {_hours(found.hours)}")
    click.echo(f"  what this process alone computes: {_hours(found.head_hours)}")
    click.echo(f"  {found.tasks:,} tasks, one after another: {_hours(found.task_hours)}")
    click.echo(
        f"  the largest task: {found.worker_bytes / 1e9:.1f} GB; moved: "
        f"{found.moved_bytes / 1e9:,.1f} GB; disk: {found.disk_bytes / 1e9:,.1f} GB"
    )
    narrower = f" {found.timed_width} wide for {found.widest}," if found.is_scaled else ""
    click.echo(f"  from one layer,{narrower} that was timed on this machine")


def _hours(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{60 * hours:.0f} minutes" if hours >= 1 / 30 else f"{3600 * hours:.0f} seconds"
