"""`skipcat compress`: a model in, a compressed checkpoint out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pipeline.cli import options
from pipeline.compress.cache.cache_forms import CACHE_BITS, CACHE_FORMS, DEFAULT_CACHE_FORM
from pipeline.compress.methods import (
    DEFAULT_EFFORT,
    DEFAULT_METHOD,
    EFFORTS,
    METHODS,
    ROTATIONS,
)
from pipeline.compress.request import CompressRequest
from pipeline.quantize.formats import DEFAULT_RUNTIME, RUNTIMES

_LANGUAGE_MODELS = "Language models only."

effort_option = options.setting(
    "--effort",
    DEFAULT_EFFORT,
    "Minutes against quality: how much text is read, and how layers are fitted.",
    click.Choice(list(EFFORTS)),
)
_budget_options = options.apply(
    options.setting(
        "--keep-params",
        0.8,
        "Fraction of the decoder's linear parameters to keep, in (0, 1]. Not looked at with "
        "--memory or --keep-bytes, whose search decides it.",
    ),
    click.option(
        "--memory",
        help="Bytes that all weights may take, such as 60MB: ranks and bits are searched together. "
        "Excludes --keep-bytes and --weights.",
    ),
    click.option(
        "--keep-bytes",
        type=options.number,
        help="The same, as a fraction of the model's bytes in float16. Excludes --memory and "
        "--weights.",
    ),
    click.option(
        "--keep-macs",
        type=options.number,
        help="Of rounded convolutions: fraction of their multiplications that may stay in float32, "
        "where rounding hurts most. Excludes --memory and --keep-bytes.",
    ),
    click.option(
        "--plan",
        type=click.Path(exists=True),
        help="Follow this plan.json, in place of the ranks and formats that a budget would give.",
    ),
    heading="Budget",
)
_method_options = options.apply(
    options.setting(
        "--method",
        DEFAULT_METHOD,
        "; ".join(f"{name}: {method.summary}" for name, method in METHODS.items())
        + f". --memory and --keep-bytes need {DEFAULT_METHOD}; rtn and gptq need --weights.",
        click.Choice(list(METHODS)),
    ),
    effort_option,
    click.option(
        "--cat/--no-cat", default=True, help="Let q,k,v and gate,up share their right factor."
    ),
    click.option("--skip/--no-skip", default=True, help="Store factors in block-skip form."),
    click.option("--one-sided", is_flag=True, help="Weigh all outputs of a matrix alike."),
    click.option(
        "--one-shot",
        is_flag=True,
        help="Fit layers to the original's inputs, whatever the effort. Excludes --mix.",
    ),
    click.option(
        "--mix",
        type=options.number,
        help="Share of the original's output in the targets of layers; by default the effort's. "
        "Excludes --one-shot.",
    ),
    click.option(
        "--rank-multiple", type=options.positive, default=1, help="Make ranks multiples of this."
    ),
    heading="Method",
)
calibration_options = options.apply(
    options.setting(
        "--calibration",
        "self",
        "A text file, 'wikitext2+c4' from the hub, 'self': text the model generates; or "
        "several, joined by '+'. For an image classifier a folder of images, or a .npz, .npy or "
        ".safetensors of arrays. For a driving network a folder of images, or scenes:DOMAIN:COUNT.",
    ),
    click.option(
        "--windows",
        type=options.positive,
        help="Of calibration text, or images; by default the effort's.",
    ),
    click.option(
        "--window-length",
        type=options.positive,
        help=f"Tokens in each; by default the effort's. {_LANGUAGE_MODELS}",
    ),
    options.seed,
    heading="Calibration",
)
_quantization_options = options.apply(
    options.setting(
        "--runtime",
        DEFAULT_RUNTIME,
        "What will run the quantised model: which formats it takes, and in whose file bytes "
        "are counted; cpu is ONNX Runtime on a CPU. "
        + "; ".join(f"{name}: {runtime.takes}" for name, runtime in RUNTIMES.items())
        + ".",
        click.Choice(list(RUNTIMES)),
    ),
    click.option(
        "--weights",
        help="One format, such as int8-b64-sym (bits, block, zero point), for all matrices of the "
        "layers. Excludes --memory and --keep-bytes. (--weights of `skipcat export` is how its "
        "graph holds them.)",
    ),
    click.option(
        "--table",
        help=f"One for the embedding and the LM head, such as int4-b32-asym. {_LANGUAGE_MODELS}",
    ),
    options.setting(
        "--balance",
        0.0,
        "Channel scaling, as in AWQ and SmoothQuant: scale the channels that norms feed by "
        "this power of their size, in [0, 1]; outliers go from the inputs into the weights. "
        + _LANGUAGE_MODELS,
    ),
    click.option(
        "--rotate",
        type=click.Choice(ROTATIONS),
        is_flag=False,
        flag_value=ROTATIONS[-1],
        default=ROTATIONS[0],
        show_default=True,
        help="Turn the residual stream and the heads of values by orthogonal matrices that fold "
        "into the weights, as in QuaRot: outliers are spread, and the output stays. Bare it means "
        "all; values leaves the residual stream, and a head that shares the embedding's matrix as "
        "it is. Excludes --stream-weights. " + _LANGUAGE_MODELS,
    ),
    click.option(
        "--learn-rounding",
        is_flag=True,
        help="Learn codes and scales of each layer against what it should return, after they are "
        "rounded with errors fed forward; --effort says in how many steps. Needs low bits, and "
        "--effort default or max, or --mix. " + _LANGUAGE_MODELS,
    ),
    heading="Quantisation",
)
_cache_options = options.apply(
    click.option(
        "--cache-bytes",
        help="Bytes that a token may take in the KV cache, such as 6KB: ranks and bits of keys and "
        f"values are searched. Excludes --keep-cache. {_LANGUAGE_MODELS}",
    ),
    click.option(
        "--keep-cache",
        type=options.number,
        help="The same, as a fraction of its bytes in float16. Excludes --cache-bytes.",
    ),
    click.option(
        "--context",
        type=options.positive,
        help="Tokens whose cache takes its bytes from --memory or --keep-bytes: ranks and bits of "
        "weights and cache are searched together. Excludes --cache-bytes and --keep-cache. "
        + _LANGUAGE_MODELS,
    ),
    options.setting(
        "--cache-groups",
        1,
        "Groups of key/value heads, each with a latent of its own: 1 is best for quality, as many "
        "as heads cheapest to rebuild.",
        options.positive,
    ),
    options.setting(
        "--cache-bits",
        "any",
        "Of the latents' numbers: any is searched; float leaves rank alone.",
        click.Choice(list(CACHE_BITS)),
    ),
    options.setting(
        "--cache-form",
        DEFAULT_CACHE_FORM,
        "; ".join(f"{name}: {form.summary}" for name, form in CACHE_FORMS.items())
        + ". narrow and stock exclude --cache-groups.",
        click.Choice(list(CACHE_FORMS)),
    ),
    options.setting(
        "--cache-length",
        CompressRequest.cache_length,
        "Positions that keys of --cache-form narrow and stock are made for; beyond them they lose "
        "more.",
        options.positive,
    ),
    heading="KV cache",
)
compression_options = options.apply(
    _budget_options,
    _method_options,
    calibration_options,
    _quantization_options,
    _cache_options,
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
        default="auto",
        help="Of the weights on disk that are not quantised; auto: as published (float16 for "
        "GGUF).",
    ),
    click.option(
        "--stream-weights",
        is_flag=True,
        help="Leave the weights in their files, as published, even where memory has room for "
        "them in float32; a model that is too large for that is streamed without asking. "
        + _LANGUAGE_MODELS,
    ),
)


@click.command("compress", cls=options.GroupedCommand, rest="Model, output and run")
@options.model
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder to write. Required but for --dry-run and --estimate.",
)
@compression_options
@options.trust_remote_code
@options.own_threads
@options.workers
@options.overwrite
@options.resume
@options.dry_run
@click.option(
    "--estimate",
    type=click.IntRange(0, 100_000),
    metavar="WORKERS",
    help="Time one layer here, say what all of them would take, and stop: hours, memory, bytes "
    "moved and disk with so many workers of --threads [1]; 0 for none. The model may be a shape of "
    "`skipcat bench --shape`, such as llama-3.1-70b. " + _LANGUAGE_MODELS,
)
@options.json_output
def command(
    output: Path | None,
    workers: str | None,
    overwrite: bool,
    resume: bool,
    dry_run: bool,
    estimate: int | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Factor linear layers, or round convolutions; transformers loads the result.

    \b
    skipcat compress -m smollm2-135m -o small --keep-params 0.8
    skipcat compress -m ./my-llama -o small --calibration valid.txt --windows 64 --window-length 512
    skipcat compress -m smollm2-135m -o small --memory 60MB
    skipcat compress -m ./my-vit -o small --keep-params 0.6 --calibration images/
    skipcat compress -m ./driving -o small --method int8 --runtime cpu --calibration images/
    skipcat compress -m llama-3.1-70b --estimate 8
    """  # noqa: D301 - click reads the escape
    from pipeline.compress.run import compress_to_folder
    from pipeline.output import check_output
    from pipeline.workers.workers import open_workers

    request = CompressRequest(**settings)
    request.check()
    if estimate is not None:
        from pipeline.cli.compress_estimated import show_estimate

        show_estimate(request, estimate, as_json)
        return
    if dry_run:
        with open_workers(workers) as own:
            _show_plan(request, as_json, own)
        return
    if output is None:
        raise click.MissingParameter(param_hint="'-o' / '--output'", param_type="option")
    # Before the model is loaded.
    check_output(output, overwrite=overwrite, inputs=request.paths.values())
    with open_workers(workers) as own:
        report = compress_to_folder(
            request, output, overwrite=overwrite, resume=resume, workers=own
        )
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    _show_report(report, output)
    click.echo(options.what_next(f"export {output} -o {output}-onnx"))


def _show_report(report: dict[str, Any], output: Path) -> None:
    """What was compressed, and what it takes now."""
    totals = report["totals"]
    if "convolutions" in report:
        click.echo(
            f"{output}: {totals['rounded']} of {len(report['convolutions'])} convolutions in "
            f"{report['bits']['kernels']} bits for {report['runtime']}; "
            f"{totals['stored_bytes'] / 1e6:.2f} MB of weights, "
            f"{totals['float32_bytes'] / 1e6:.2f} MB before"
        )
        return
    click.echo(f"{output}: {totals['kept_fraction']:.1%} of the linear parameters kept")
    click.echo(
        f"{totals['total_before']:,} parameters before, {totals['total_after']:,} after; "
        f"{totals['factored']} groups factored, {totals['kept_dense']} kept dense; "
        f"largest |A'| {totals['largest']:.3f}"
    )
    if totals["in_few_bits"]:
        click.echo(f"{totals['stored_bytes'] / 1e6:.2f} MB of weights on disk")
    if "cache" in report:
        cache = report["cache"]
        click.echo(
            f"KV cache: {cache['token_bytes']:,} bytes a token, {cache['kept_fraction']:.1%} of "
            f"{cache['dense_bytes']:,} in float16"
        )
    for group in report["groups"]:
        if group.get("reason"):
            click.echo(f"dense: {', '.join(group['members'])}: {group['reason']}")


def _show_plan(request: Any, as_json: bool, workers: Any) -> None:
    """What would be done: every group with its shape, rank and parameters.

    A method that searches its plan has to measure the model first, which takes most of its time.
    """
    from rich.table import Table

    from pipeline.compress.run import plan_only
    from pipeline.progress import result_console

    plan = plan_only(request, workers)
    if as_json:
        groups = [group.to_json() for group in plan.groups]
        click.echo(json.dumps({"kept_fraction": plan.kept_fraction, "groups": groups}, indent=2))
        return
    table = Table(title=f"{request.model}: {plan.kept_fraction:.2%} would be kept")
    for heading in ("members", "m x n", "form", "rank", "formats", "parameters", "after"):
        table.add_column(heading)
    for group in plan.groups:
        table.add_row(
            "\n".join(group.members),
            f"{group.rows} x {group.columns}",
            group.form,
            str(group.rank),
            " ".join(format or "-" for format in (group.down_format, group.up_format)),
            f"{group.dense_parameters:,}",
            f"{group.kept_parameters:,}",
        )
    result_console().print(table)
