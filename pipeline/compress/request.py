"""What the user asks of a compression, checked before any work is done."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from pipeline.compress.cache.cache_forms import (
    CACHE_BITS,
    CACHE_FORMS,
    DEFAULT_CACHE_FORM,
    DEFAULT_CACHE_LENGTH,
    CacheForm,
)
from pipeline.compress.methods import (
    DEFAULT_EFFORT,
    DEFAULT_METHOD,
    EFFORTS,
    METHODS,
    ROTATIONS,
    TRUNCATED,
    Effort,
    Method,
)
from pipeline.errors import UsageError
from pipeline.memory import parse_bytes
from pipeline.quantize.formats import DEFAULT_RUNTIME, RUNTIMES, Format

_SHORTENING = 4


@dataclass(frozen=True)
class CompressRequest:
    """What to compress, and how.

    Attributes:
        model: alias, hub id, folder or GGUF file.
        keep_params: fraction of the decoder's linear parameters to keep, in (0, 1].
        method: a name in METHODS.
        effort: a name in EFFORTS.
        cat: whether the method may share the right factor among matrices with the same input.
        skip: whether it may store factors in block-skip form.
        one_sided: weigh all outputs of a matrix alike, whatever the method does.
        one_shot: fit every layer to what it saw in the original model, whatever the effort is.
        mix: share of the original model's output in the targets, in [0, 1]; None for the effort's.
        rank_multiple: round ranks down to a multiple of this.
        plan: a plan.json to follow instead of making one.
        calibration: `self`, `wikitext2+c4`, or a text file.
        windows: calibration windows; None for what the effort says.
        window_length: tokens in each; None for what the effort says.
        seed: of the calibration text.
        dtype: of the weights on disk; "auto" for that of the original.
        stream_weights: leave the weights in their files, as published, even where memory has room
            for them in float32.
        trust_remote_code: let the model's own code run.
        memory: bytes that all weights may take, such as "60MB"; ranks and bits are then searched
            together, and `keep_params` is not looked at.
        keep_bytes: the same, as a fraction of the bytes that the model has in float16.
        keep_macs: of a network whose convolutions are rounded: fraction of their multiplications
            that may stay in float32, where rounding hurts most.
        runtime: whose low-bit formats may be used, and in whose file bytes are counted.
        weights: one low-bit format for all matrices of the decoder's layers.
        table: one for the embedding and the head.
        balance: channels that norms feed are scaled by this power of their size, in [0, 1]; 0 for
            not at all.
        rotate: what is turned by orthogonal matrices that fold into the weights, a name in
            ROTATIONS.
        learn_rounding: learn codes and scales of each layer against what it should return.
        cache_bytes: bytes that a token may take in the KV cache, such as "6KB"; None for all.
        keep_cache: the same, as a fraction of those in float16.
        context: tokens whose cache takes its bytes from the budget of the weights: what each of the
            two is worth is searched, by one program.
        cache_groups: groups of key/value heads, each with a latent of its own.
        cache_bits: of the latents: `any`, `float`, or a number.
        cache_form: a name in CACHE_FORMS.
        cache_length: positions that keys mapped after their rotation are made for.
    """

    model: str
    keep_params: float = 0.8
    method: str = DEFAULT_METHOD
    effort: str = DEFAULT_EFFORT
    cat: bool = True
    skip: bool = True
    one_sided: bool = False
    one_shot: bool = False
    mix: float | None = None
    rank_multiple: int = 1
    plan: str | None = None
    calibration: str = "self"
    windows: int | None = None
    window_length: int | None = None
    seed: int = 0
    dtype: str = "auto"
    stream_weights: bool = False
    trust_remote_code: bool = False
    memory: str | None = None
    keep_bytes: float | None = None
    keep_macs: float | None = None
    runtime: str = DEFAULT_RUNTIME
    weights: str | None = None
    table: str | None = None
    balance: float = 0.0
    rotate: str = ROTATIONS[0]
    learn_rounding: bool = False
    cache_bytes: str | None = None
    keep_cache: float | None = None
    context: int | None = None
    cache_groups: int = 1
    cache_bits: str = "any"
    cache_form: str = DEFAULT_CACHE_FORM
    cache_length: int = DEFAULT_CACHE_LENGTH

    def check(self) -> None:
        """Refuse values that cannot be meant, before any work is done.

        Raises:
            UsageError: names the value and its range.
        """
        self._check_fractions()
        if self.mix is not None and (self.one_shot or not 0 <= self.mix <= 1):
            raise UsageError(
                "There is no such mixture of targets.",
                where="--mix",
                observed="--one-shot as well" if self.one_shot else self.mix,
                expected="a number in [0, 1], without --one-shot",
            )
        for name in ("rank_multiple", "windows", "window_length", "context", "cache_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(
                    "A count must be at least 1.",
                    where="--" + name.replace("_", "-"),
                    observed=value,
                )
        for flag, value, known in (
            ("--method", self.method, METHODS),
            ("--effort", self.effort, EFFORTS),
            ("--runtime", self.runtime, RUNTIMES),
            ("--cache-form", self.cache_form, CACHE_FORMS),
            ("--cache-bits", self.cache_bits, CACHE_BITS),
            ("--rotate", self.rotate, ROTATIONS),
        ):
            if value not in known:
                raise UsageError(
                    "There is no such choice.",
                    where=flag,
                    observed=value,
                    expected=", ".join(known),
                )
        if self.rotates and self.stream_weights:
            raise UsageError(
                "What is turned is held in float32.",
                where="--rotate",
                observed="--stream-weights as well",
                expected="at most one of them",
            )
        self._check_bits()
        self._check_cache()

    def _check_fractions(self) -> None:
        """Refuse shares, and powers, beyond 0 and 1."""
        for what, flag, value, range_and_example in (
            ("The kept fraction", "--keep-params", self.keep_params,
             "(0, 1]; 0.8 keeps 80% of the decoder's linear parameters"),
            ("The fraction of bytes", "--keep-bytes", self.keep_bytes,
             "(0, 1]; 0.25 keeps a quarter of the float16 bytes"),
            ("The fraction of the cache", "--keep-cache", self.keep_cache,
             "(0, 1]; 0.25 keeps a quarter of the float16 bytes"),
            ("The fraction of multiplications", "--keep-macs", self.keep_macs,
             "[0, 1]; 0.1 keeps a tenth of them in float32"),
            ("The power that scales channels", "--balance", self.balance, "[0, 1]"),
        ):  # fmt: skip
            open_at_zero = range_and_example.startswith("(")
            if value is not None and not (0 <= value <= 1 and (value or not open_at_zero)):
                raise UsageError(
                    f"{what} is out of range.",
                    where=flag,
                    observed=value,
                    expected=f"a number in {range_and_example}",
                )

    def _check_cache(self) -> None:
        """Refuse budgets of the cache that cannot be meant."""
        if sum(x is not None for x in (self.cache_bytes, self.keep_cache, self.context)) > 1:
            raise UsageError(
                "The cache has one budget.",
                where="--cache-bytes, --keep-cache, --context",
                expected="at most one of them",
            )
        if self.context is not None and (not self.searches_bits or self.plan is not None):
            raise UsageError(
                "Weights and cache share a budget only where both are searched.",
                where="--context",
                observed="--plan" if self.plan is not None else "no budget of bytes",
                expected="--memory or --keep-bytes, without --plan",
                change="pass --cache-bytes for a budget of the cache's own",
            )
        if self.cache_bytes is not None:
            parse_bytes(self.cache_bytes, "--cache-bytes")
        if METHODS[self.method].cache_alone and not self.shrinks_cache and self.plan is None:
            raise UsageError(
                "This method makes the cache smaller, and nothing else.",
                where=f"--method {self.method}",
                expected="--keep-cache 0.5, or --cache-bytes",
            )
        self._check_form()

    def _check_form(self) -> None:
        """Refuse what a form of the cache does not go together with."""
        form, refused = self.form_of_cache, None
        if form.by_head and self.cache_groups != 1:
            refused = f"--cache-groups {self.cache_groups}"
        if form.by_head and METHODS[self.method].cache_alone:
            refused = f"--method {self.method}"
        if not form.rounds and self.cache_bits not in ("any", "float"):
            refused = f"--cache-bits {self.cache_bits}"
        if refused is not None:
            raise UsageError(
                "This form of the cache has latents of its own kind.",
                where=f"--cache-form {self.cache_form}",
                observed=refused,
                expected=f"{self.cache_form}: {form.summary}",
                change="leave one of the two out",
            )

    def _check_bits(self) -> None:
        """Refuse budgets of bytes, and formats, that cannot be meant."""
        self._check_macs()
        if sum(x is not None for x in (self.memory, self.keep_bytes, self.weights)) > 1:
            raise UsageError(
                "Formats are either searched under one budget of bytes, or given.",
                where="--memory, --keep-bytes, --weights",
                expected="at most one of them",
            )
        if self.memory is not None:
            parse_bytes(self.memory, "--memory")
        method = METHODS[self.method]
        searches = method.allocation.needs_costs or method.convolutions is not None
        if self.searches_bits and not searches:
            raise UsageError(
                "This method does not search ranks and bits.",
                where=f"--method {self.method}",
                expected=f"--method {DEFAULT_METHOD} with a budget of bytes",
            )
        if METHODS[self.method].quantizer and self.weights is None:
            raise UsageError(
                "A quantiser needs a format.",
                where=f"--method {self.method}",
                expected="--weights int4-b32-asym, and --table for the embedding and the head",
            )
        self._check_learning()
        for flag, name in (("--weights", self.weights), ("--table", self.table)):
            if name is not None:
                self._check_format(flag, name)

    def _check_macs(self) -> None:
        """Refuse a share of multiplications that cannot be meant."""
        if self.keep_macs is None:
            return
        if METHODS[self.method].convolutions is None or self.searches_bits:
            raise UsageError(
                "Multiplications are a budget of rounded convolutions, and their only one.",
                where=f"--keep-macs with --method {self.method}",
                expected="--method int8, without --memory and --keep-bytes",
            )

    def _check_learning(self) -> None:
        """Refuse to learn a rounding where there is none, or nothing to learn from."""
        if not self.learn_rounding:
            return
        if not (self.searches_bits or self.weights is not None or self.plan is not None):
            raise UsageError(
                "Nothing is rounded whose rounding could be learned.",
                where="--learn-rounding",
                expected="--memory, --keep-bytes, --weights, or a --plan with formats",
            )
        if self.resolved_method.fit.mix is None:
            raise UsageError(
                "Rounding is learned on what the compressed model feeds a layer.",
                where="--learn-rounding",
                observed="layers that are fitted to the original's inputs alone",
                expected="--effort default or max, or --mix",
            )

    def _check_format(self, flag: str, name: str) -> None:
        try:
            format = Format.parse(name)
        except ValueError as error:
            raise UsageError("There is no such format.", where=flag, observed=error) from error
        runtime = RUNTIMES[self.runtime]
        if not runtime.accepts(format):
            raise UsageError(
                "The runtime does not multiply with matrices of this format.",
                where=flag,
                observed=f"{name}, with --runtime {runtime.name}",
                expected=runtime.takes,
                change="choose another format, or --runtime any for PyTorch alone",
            )

    @property
    def paths(self) -> dict[str, str]:
        """What is read, as it was named; some of it may be no path."""
        named = {"model": self.model, "calibration": self.calibration, "plan": self.plan}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def rotates(self) -> bool:
        """Whether anything is turned before all else."""
        return self.rotate != ROTATIONS[0]

    @property
    def searches_bits(self) -> bool:
        """Whether there is a budget of bytes."""
        return self.memory is not None or self.keep_bytes is not None

    @property
    def shrinks_cache(self) -> bool:
        """Whether the cache has a budget; a plan of the user's may say so, too."""
        return any(x is not None for x in (self.cache_bytes, self.keep_cache, self.context))

    @property
    def form_of_cache(self) -> CacheForm:
        """What latents are to be like."""
        return CACHE_FORMS[self.cache_form]

    @property
    def cache_formats(self) -> tuple[int | None, ...]:
        """Bits to choose from; None among them for float16."""
        return CACHE_BITS[self.cache_bits] if self.form_of_cache.rounds else (None,)

    def cache_budget(self, float16_bytes: int) -> int:
        """Bytes a token, of a model whose cache takes so many in float16."""
        if self.cache_bytes is not None:
            return parse_bytes(self.cache_bytes, "--cache-bytes")
        return int((self.keep_cache or 1.0) * float16_bytes)

    @property
    def formats(self) -> tuple[Format, ...]:
        """What a search of bits chooses from; nothing where there is none."""
        return RUNTIMES[self.runtime].formats if self.searches_bits else ()

    @property
    def is_quantized(self) -> bool:
        """Whether any matrix may be quantised; a plan of the user's may say so, too."""
        return self.searches_bits or self.weights is not None or self.table is not None

    @property
    def changes_weights(self) -> bool:
        """Whether anything but a copy of the model is asked for."""
        return (
            self.plan is not None
            or (self.keep_params < 1 and not METHODS[self.method].cache_alone)
            or self.searches_bits
            or self.weights is not None
        )

    def budget_bytes(self, float16_bytes: int) -> int:
        """The budget of a model whose weights take so many bytes in float16."""
        if self.memory is not None:
            return parse_bytes(self.memory, "--memory")
        return int((self.keep_bytes or 1.0) * float16_bytes)

    @property
    def resolved_effort(self) -> Effort:
        """The effort, with the windows that were asked for in place of its own."""
        effort = EFFORTS[self.effort]
        length, windows = self.window_length or effort.window_length, self.windows or effort.windows
        if self.calibration == "self" and self.windows is None and self.window_length is None:
            # As many tokens in shorter windows: sampling takes a step for each token of a window.
            length, windows = length // _SHORTENING, windows * _SHORTENING
        # Gradients, too, are of as many tokens where windows are shorter.
        survey = effort.survey_windows * max(1, math.ceil(effort.window_length / length))
        return replace(
            effort,
            windows=windows,
            window_length=length,
            survey_windows=min(survey, windows),
            tokens_per_width=effort.tokens_per_width if self.windows is None else None,
        )

    @property
    def resolved_method(self) -> Method:
        """The method, without what was switched off, fitted as the effort allows."""
        method = METHODS[self.method]
        fit = method.fit
        if method.allocation.needs_costs:
            fit = replace(fit, mix=self.resolved_effort.mix)
        if self.mix is not None:
            fit = replace(fit, mix=self.mix)
        if self.one_shot:
            fit = replace(fit, mix=None, factorize=TRUNCATED)
        if self.one_sided:
            fit = replace(fit, two_sided=False)
        if self.learn_rounding:
            fit = replace(fit, learned_steps=self.resolved_effort.rounding_steps)
        return replace(method, cat=method.cat and self.cat, skip=method.skip and self.skip, fit=fit)
