"""What graph the user wants, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.errors import UsageError
from pipeline.export.contract import (
    CACHES,
    CPU,
    DEFAULT_MAX_LENGTH,
    DEFAULT_PROFILE,
    DTYPES,
    FIRST_ROUNDED_CACHE,
    FLOAT,
    FLOAT32,
    INT8,
    INTEGER,
    PRODUCTS,
    PROFILES,
    ROUNDED,
    STORED,
    WEIGHTS,
    Profile,
)
from pipeline.progress import note
from pipeline.quantize.cache_rounding import CacheRounding
from pipeline.quantize.formats import RUNTIMES, Format


@dataclass(frozen=True)
class ExportRequest:
    """What graph to make.

    Attributes:
        profile: name in `PROFILES`.
        dtype: "float32" for the CPU, "float16" for TensorRT.
        max_length: slots of the static cache, prompt and answer together.
        weights: "float", which is as `dtype` says, "int8", "int4", "int4-offset", or "stored": the
            codes that the checkpoint holds. None is "stored" where the runtime takes them; else
            float, but in the profile `cpu`, which alone has the operators for it, int8, or
            int4-offset where that rounds nothing.
        products: of quantised matrices in the profile `cpu`: "integer" rounds inputs to 8 bits
            and is fast, "float" multiplies in float32.
        trust_remote_code: let Python code that comes with the checkpoint run.
        cache: how keys and values are held: "float", or in the profile `cpu` "int8".
        calibration: text to find the scales of a rounded cache with, as `pipeline.calibrate.text`
            reads it; None is text that the model generates.
        rounding: those scales; `export_folder` finds them.
    """

    profile: str = DEFAULT_PROFILE
    dtype: str = FLOAT32
    max_length: int = DEFAULT_MAX_LENGTH
    weights: str | None = None
    products: str = INTEGER
    trust_remote_code: bool = False
    cache: str = FLOAT
    calibration: str | None = None
    rounding: CacheRounding | None = None

    @property
    def traits(self) -> Profile:
        """What the profile says of the graph."""
        return PROFILES[self.profile]

    @property
    def runs_in(self) -> str:
        """The runtimes and their oldest versions, for messages."""
        traits = self.traits
        if self.cache != FLOAT:
            traits = replace(traits, oldest_onnxruntime=FIRST_ROUNDED_CACHE)
        return traits.runs_in

    @property
    def _unquantized_weights(self) -> str:
        """How the matrices of a checkpoint without quantised ones are stored."""
        return self.weights or (INT8 if self.profile == CPU else FLOAT)

    def weights_of(self, widths: dict[Format, set[int]]) -> str:
        """How the matrices are stored, of a checkpoint that holds quantised ones.

        Args:
            widths: format -> columns of the matrices that are in it.

        Raises:
            UsageError: the runtimes of the profile do not take them, or there are none to keep.
        """
        if not widths:
            if self.weights == STORED:
                raise UsageError(
                    "The checkpoint holds no quantised matrix.",
                    where="--weights stored",
                    change="leave --weights out, or compress with --memory or --weights",
                )
            return self._unquantized_weights
        if self.weights in ROUNDED:
            raise UsageError(
                "The checkpoint's matrices are quantised already.",
                where="--weights",
                observed=f"{self.weights}, of {', '.join(sorted(f.name for f in widths))}",
                change="leave --weights out",
            )
        runtime = RUNTIMES[self.traits.formats_of]
        others = sorted(
            format_.name
            for format_, columns in widths.items()
            if not all(runtime.accepts(format_, count) for count in columns)
        )
        if not others:
            return self.weights or STORED
        if self.profile == CPU or self.weights == STORED:
            raise UsageError(
                "The runtime does not take the checkpoint's formats.",
                where=f"--profile {self.profile}",
                observed=", ".join(others),
                expected=runtime.takes,
                change=f"compress with --runtime {runtime.name}, or pass --weights float with "
                "--profile opset24, which undoes the rounding's savings",
            )
        if self.weights is None:
            note(
                f"weights are exported as {self.dtype}, not quantised: --profile {self.profile} "
                f"takes {runtime.takes}; the checkpoint has {', '.join(others)}"
            )
        return FLOAT

    def check(self) -> None:
        """Refuse what no graph can be made for.

        Raises:
            UsageError: names the value and what is possible.
        """
        for flag, value, choices in (
            ("--profile", self.profile, PROFILES),
            ("--dtype", self.dtype, DTYPES),
            ("--weights", self._unquantized_weights, WEIGHTS),
            ("--products", self.products, PRODUCTS),
            ("--cache", self.cache, CACHES),
        ):
            if value not in choices:
                raise UsageError(
                    "Unknown choice.", where=flag, observed=value, expected=", ".join(choices)
                )
        if self.profile != CPU and self.weights in ROUNDED:
            raise UsageError(
                "Only ONNX Runtime's own operators hold weights that the export rounds.",
                where="--weights",
                observed=f"{self.weights}, with --profile {self.profile}",
                change="pass --profile cpu, or leave --weights out",
            )
        if self.profile == CPU and self.dtype != FLOAT32:
            raise UsageError(
                "On the CPU everything but the weights is computed in float32.",
                where="--dtype",
                observed=f"{self.dtype}, with --profile cpu",
                change="leave --dtype out",
            )
        self._check_cache()
        if self.max_length < 2:
            raise UsageError(
                "The cache is too short.", where="--max-length", observed=self.max_length
            )

    def _check_cache(self) -> None:
        if self.cache != FLOAT and self.profile != CPU:
            raise UsageError(
                "Only ONNX Runtime's own attention on the CPU reads a cache of 8 bits.",
                where="--cache",
                observed=f"{self.cache}, with --profile {self.profile}",
                change="pass --profile cpu, or leave --cache out",
            )
        if self.cache == FLOAT and self.calibration is not None:
            raise UsageError(
                "Nothing is calibrated: a cache of floats has no scales.",
                where="--calibration",
                observed=self.calibration,
                change="pass --cache int8, or leave --calibration out",
            )
