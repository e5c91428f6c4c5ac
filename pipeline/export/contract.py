"""What an ONNX folder holds and by which names: export writes it, and every later stage reads it.

It imports nothing, so that the command line may read its choices here.
"""

from __future__ import annotations

from dataclasses import dataclass

SCHEMA = 1  # of export.json

# --- files ---

GRAPH_FILE = "model.onnx"
WEIGHTS_FILE = "model.onnx.data"
RECORD_FILE = "export.json"
GENAI_FILE = "genai_config.json"

# --- tensors ---

INPUT_IDS, ATTENTION_MASK, POSITION_IDS = "input_ids", "attention_mask", "position_ids"
TOKEN_INPUTS = (INPUT_IDS, ATTENTION_MASK, POSITION_IDS)
FIRST_LOGIT = "first_logit"  # optional: the first token whose logits are wanted
PIXEL_VALUES = "pixel_values"
LOGITS = "logits"
# Of a driving network, undecoded: boxes at each of its strides, and the logits of two masks.
BOX_STRIDES = (8, 16, 32)
DRIVABLE, LANE = "drivable", "lane"
DRIVING_MAPS = (*(f"boxes_{stride}" for stride in BOX_STRIDES), DRIVABLE, LANE)
PAST, PRESENT = "past_key_values", "present"
CACHE_PREFIX = f"{PAST}."


def cache_names(layers: int | str, prefix: str = PAST) -> list[str]:
    """`prefix.{i}.key`, `prefix.{i}.value` for so many layers, or for one that is not a number."""
    numbers = range(layers) if isinstance(layers, int) else [layers]
    return [f"{prefix}.{i}.{part}" for i in numbers for part in ("key", "value")]


def steps_name(name: str) -> str:
    """`past_key_values.3.key_steps`, beside codes: a step and an offset of each token and group."""
    return f"{name}_steps"


def present_name(past_name: str) -> str:
    """`past_key_values.3.key` -> `present.3.key`."""
    return past_name.replace(PAST, PRESENT, 1)


# --- operators ---

DOMAIN, OP_VERSION = "skipcat", 1
# How a matrix, or a side of the cache, is held: as numbers, as codes of a byte each, or as two
# codes to a byte.
NUMBERS, BYTES, NIBBLES = "", "8", "4"
HELD_FORMS = (NUMBERS, BYTES, NIBBLES)
_NIBBLE = 4  # bits of half a byte
BLOCK_SKIP, BLOCK_SKIP_INDEXED = "BlockSkipLinear", "BlockSkipLinearIndexed"
BLOCK_SKIP_OPS = (BLOCK_SKIP, BLOCK_SKIP_INDEXED)
LINEAR_QUANTIZED = "LinearQuantized"
# Numbers of a and of b to a scale: attributes of nodes that hold codes, and fields of the plugin's.
BLOCK_A, BLOCK_B = "block_a", "block_b"
# Of the body of BLOCK_SKIP, with a factor out of DequantizeLinear; no plugin takes them.
DEQUANTIZED_SKIP, DEQUANTIZED_SKIP_INDEXED = (
    "BlockSkipLinearFewBits",
    "BlockSkipLinearFewBitsIndexed",
)
DEQUANTIZED_SKIP_OPS = (DEQUANTIZED_SKIP, DEQUANTIZED_SKIP_INDEXED)


def block_skip_op(a: str, b: str, indexed: bool) -> str:
    """`BlockSkipLinearA4B8Indexed`: of factors held as they say, and of an x that is reordered."""
    held = ("A" + a if a else "") + ("B" + b if b else "")
    return BLOCK_SKIP + held + ("Indexed" if indexed else "")


# Of weights that are codes, which the kernels read as they are.
QUANTIZED_OPS = (
    *(
        block_skip_op(a, b, indexed)
        for a in HELD_FORMS
        for b in HELD_FORMS
        for indexed in (False, True)
        if a or b
    ),
    LINEAR_QUANTIZED + BYTES,
    LINEAR_QUANTIZED + NIBBLES,
)
LATENT_ATTENTION, REBUILT_KEYS = "LatentAttention", "Rebuilt"
CACHE_WRITE = "CacheWrite"  # new keys or values into a cache of fixed length, by a plugin in place


def form_of(bits: int | None) -> str:
    """How numbers of so many bits are held; None rounds nothing."""
    if bits is None:
        return NUMBERS
    return NIBBLES if bits <= _NIBBLE else BYTES


def held_width(rank: int, bits: int | None) -> int:
    """Numbers or bytes that a latent takes in the cache, without step and low."""
    return -(-rank // 2) if form_of(bits) == NIBBLES else rank


def latent_attention_op(rebuilt: bool, keys: str, values: str) -> str:
    """`LatentAttentionRebuiltKeys4Values8`: of keys that are rebuilt, and so held sides."""
    held = ("Keys" + keys if keys else "") + ("Values" + values if values else "")
    return LATENT_ATTENTION + (REBUILT_KEYS if rebuilt else "") + held


LATENT_OPS = tuple(
    latent_attention_op(rebuilt, keys, values)
    for rebuilt in (False, True)
    for keys in HELD_FORMS
    for values in HELD_FORMS
)
PLUGIN_OPS = (*BLOCK_SKIP_OPS, *QUANTIZED_OPS, *LATENT_OPS, CACHE_WRITE)  # that TensorRT's has
DEQUANTIZE = "DequantizeLinear"
BLOCKED_OPSET = 21  # the first in which it takes blocks
CONTRIB = "com.microsoft"  # the domain of ONNX Runtime's own operators
MATMUL_NBITS, GATHER_NBITS = "MatMulNBits", "GatherBlockQuantized"
GROUPED_ATTENTION = "GroupQueryAttention"
# What a block's codes are counted from: the middle, zero points, or any number of its own.
MATMUL_BLOCKS = "MatMulBlocks"
_COUNTED_FROM = {"sym": "", "asym": "Zeros", "offset": "Rests"}


# `MatMulBlocksRestsBias`: by a format's zero, and whether there is a vector to add.
MATMUL_BLOCKS_OPS = {
    (zero, bias): MATMUL_BLOCKS + counted + ("Bias" if bias else "")
    for zero, counted in _COUNTED_FROM.items()
    for bias in (False, True)
}
BLOCK_SKIP_BLOCKS = "BlockSkipBlocks"
# `BlockSkipBlocksAZerosBIndexed`: by the zeros of both factors, and whether x is reordered.
BLOCK_SKIP_BLOCKS_OPS = {
    (a, b, indexed): f"{BLOCK_SKIP_BLOCKS}A{of_a}B{of_b}" + ("Indexed" if indexed else "")
    for a, of_a in _COUNTED_FROM.items()
    for b, of_b in _COUNTED_FROM.items()
    for indexed in (False, True)
}
# Rows of an embedding. Those with offsets are put together by nodes of ONNX Runtime's.
LOOK_UP_BLOCKS_OPS = {zero: "LookUpBlocks" + _COUNTED_FROM[zero] for zero in ("sym", "asym")}
_INPUTS = {"sym": 2, "asym": 3, "offset": 4}  # that hold a matrix; of offsets the last sums blocks


def _read_by_bodies(first: int, *zeros: str) -> tuple[int, ...]:
    """Which inputs sum blocks, of matrices whose inputs begin with number `first`."""
    places = []
    for zero in zeros:
        first += _INPUTS[zero]
        places += [first - 1] if zero == "offset" else []
    return tuple(places)


# Ops for which there are kernels on the CPU -> inputs that their bodies alone read.
CPU_KERNEL_OPS = {
    **{name: _read_by_bodies(1, zero) for (zero, _), name in MATMUL_BLOCKS_OPS.items()},
    **{
        name: _read_by_bodies(1 + indexed, a, b)
        for (a, b, indexed), name in BLOCK_SKIP_BLOCKS_OPS.items()
    },
    **dict.fromkeys(LOOK_UP_BLOCKS_OPS.values(), ()),
}

# --- choices of an export ---

FLOAT32, FLOAT16 = "float32", "float16"
DTYPES = (FLOAT32, FLOAT16)
FLOAT, INT8, INT4, INT4_OFFSET, STORED = "float", "int8", "int4", "int4-offset", "stored"
ROUNDED = (INT8, INT4, INT4_OFFSET)  # by the export
WEIGHTS = (FLOAT, *ROUNDED, STORED)
CACHES = (FLOAT, INT8)  # how the profile `cpu` holds keys and values
# Of latents: NumPy's and PyTorch's names of what codes, and their steps, are held in.
CODE_TYPE, STEP_TYPE = INT8, FLOAT16
FIRST_ROUNDED_CACHE = (1, 27)  # ONNX Runtime's, whose attention on the CPU reads and writes codes
INTEGER = "integer"
# What `accuracy_level` of ONNX Runtime's products each is.
PRODUCTS = {INTEGER: 4, FLOAT: 0}

OPSET24, COMPAT, COMPAT_STATIC, CPU = "opset24", "compat", "compat-static", "cpu"
_Version = tuple[int, int]


@dataclass(frozen=True)
class Profile:
    """A family of runtimes that one graph serves.

    Attributes:
        name: as the user writes it.
        opset: of the default domain.
        static_cache: the cache is written in place (TensorScatter, or CacheWrite where the opset
            has none), instead of growing (Concat).
        native_attention: Attention, RMSNormalization and RotaryEmbedding as single operators,
            instead of primitives.
        contrib: ONNX Runtime's own operators (com.microsoft): attention that rotates, writes the
            cache and attends in one node, norms that add, quantised matrices.
        formats_of: the runtime of `pipeline.quantize.formats` whose formats it takes.
        oldest_onnxruntime: the first that has the operators.
        oldest_tensorrt: likewise; None where TensorRT knows them not.
        others: where else it runs, for messages.
        summary: for help, with the versions to be filled in.
    """

    name: str
    opset: int
    static_cache: bool
    native_attention: bool
    contrib: bool
    formats_of: str
    oldest_onnxruntime: _Version
    oldest_tensorrt: _Version | None
    others: str
    summary: str

    @property
    def plugin_writes(self) -> bool:
        """Whether only our plugin writes the cache in place: TensorRT's own layers make it grow."""
        return self.static_cache and not self.native_attention and not self.contrib

    @property
    def fixed_length(self) -> bool:
        """Whether the graph fixes the length of its cache, rather than take one of any length."""
        return self.static_cache and not self.contrib

    @property
    def runs_in(self) -> str:
        """The runtimes and their oldest versions, for messages."""
        known = [f"ONNX Runtime >= {dotted(self.oldest_onnxruntime)}"]
        if self.oldest_tensorrt is not None:
            known.append(f"TensorRT >= {dotted(self.oldest_tensorrt)}")
        return ", ".join(known) + self.others

    @property
    def help(self) -> str:
        """What it is and what it is for, in a line."""
        tensorrt = dotted(self.oldest_tensorrt) if self.oldest_tensorrt else ""
        return f"{self.name}: " + self.summary.format(
            onnxruntime=dotted(self.oldest_onnxruntime), tensorrt=tensorrt
        )


def dotted(version: tuple[int, ...]) -> str:
    """(10, 3) -> "10.3"."""
    return ".".join(map(str, version))


# A window of ONNX Runtime's own attention had one token more before 1.24.
# `compat` is there for JetPack 6.1 and 6.2, whose TensorRT is 10.3: nothing is built with an older.
_PROFILES = (
    Profile(
        OPSET24, 24, True, True, False, "tensorrt", (1, 25), (10, 15), ", RTX",
        "static cache, for ONNX Runtime >= {onnxruntime} and TensorRT >= {tensorrt}",
    ),
    Profile(
        COMPAT, 18, False, False, False, "tensorrt", (1, 18), (10, 3), "",
        "primitives and a growing cache, for TensorRT {tensorrt} and later (JetPack 6.2)",
    ),
    Profile(
        COMPAT_STATIC, 18, True, False, False, "tensorrt", (1, 18), (10, 3), "",
        "primitives and a static cache that the plugin writes, for TensorRT {tensorrt} and later",
    ),
    Profile(
        CPU, 23, True, True, True, "cpu", (1, 24), None, " and onnxruntime-genai, CPU",
        "ONNX Runtime's own operators, the fastest where there is no GPU",
    ),
)  # fmt: skip
PROFILES = {profile.name: profile for profile in _PROFILES}
DEFAULT_PROFILE = OPSET24
# Tokens that a cache holds, prompt and answer together; never more than the model's positions.
DEFAULT_MAX_LENGTH = 2048
