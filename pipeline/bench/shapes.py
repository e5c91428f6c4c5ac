"""Architectures by name, to be built with no weights on hand; the published numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from pipeline.compress.plan.plan import RankPlan

# Linears of a decoder layer that read the same input, in all families.
_GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
_SEED = 0
_FILL_BLOCK = 1 << 20


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder.

    Attributes:
        model_type: the family, by transformers' name for it.
        hidden: width of the residual stream.
        intermediate: width between the matrices of the MLP.
        layers: how many.
        heads: of queries.
        kv_heads: of keys and values.
        head_dim: width of a head.
        vocab: rows of the embedding.
        tied: whether the head is the embedding.
        positions: longest context.
        window: tokens that most layers see; None where all see all.
        full_every: the last of so many layers sees all tokens.
    """

    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    positions: int
    window: int | None = None
    full_every: int = 1

    def config(self) -> Any:
        """The transformers configuration."""
        from transformers import AutoConfig

        return AutoConfig.for_model(
            self.model_type,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab,
            tie_word_embeddings=self.tied,
            max_position_embeddings=self.positions,
            **({} if self.window is None else {"sliding_window": self.window}),
        )

    def window_of(self, layer: int) -> int | None:
        """Tokens that a layer sees; None for all."""
        return None if (layer + 1) % self.full_every == 0 else self.window

    def linears(self) -> tuple[tuple[tuple[str, ...], int, tuple[int, ...]], ...]:
        """Linears of a layer that share an input: names, its width, and height of each."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        heights = ((queries, keys, keys), (self.hidden,), 2 * (self.intermediate,), (self.hidden,))
        widths = (self.hidden, queries, self.hidden, self.intermediate)
        return tuple(zip(_GROUPS, widths, heights, strict=True))

    def empty_model(self, kept: float = 1.0) -> Any:
        """The architecture with all parameters on the meta device; buffers are real.

        Args:
            kept: fraction of the parameters of each group of linears to keep, in (0, 1].
                Factors get the ranks of the uniform plan.

        Raises:
            UsageError: `kept` outside (0, 1].
        """
        import torch
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        from pipeline.checkpoint.install import group_entries
        from pipeline.checkpoint.modeling_skipcat import stored_layer

        plan = self.plan(kept)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(self.config(), dtype=torch.float32)
        for group in plan.groups:
            if group.form == "dense":
                continue
            entries = group_entries(group.members, group.form, group.rank)
            for name, entry in entries.items():
                model.set_submodule(name, stored_layer(model, name, entry, device="meta"))
        model.tie_weights()
        return model.eval()

    def plan(self, kept: float, multiple: int = 1) -> RankPlan:
        """The uniform plan for an architecture, from its sizes alone; ranks in multiples.

        Raises:
            UsageError: `kept` outside (0, 1].
        """
        from pipeline.compress.plan.plan import uniform_plan
        from pipeline.model.structure import Group, Layer

        layers = []
        for index in range(self.layers):
            name = f"model.layers.{index}"
            groups = tuple(
                Group(tuple(f"{name}.{member}" for member in members), width, tall)
                for members, width, tall in self.linears()
            )
            layers.append(Layer(name, groups))
        return uniform_plan(layers, kept, multiple=multiple)


_SHAPES = {
    "gemma3-1b": Shape("gemma3_text", 1152, 6912, 26, 4, 1, 256, 262144, True, 32768, 512, 6),
    "gemma3-4b": Shape("gemma3_text", 2560, 10240, 34, 8, 4, 256, 262208, True, 131072, 1024, 6),
    "llama-3.1-70b": Shape("llama", 8192, 28672, 80, 64, 8, 128, 128256, False, 131072),
    # One layer, and a vocabulary so small that the head does not hide it.
    "llama-3.1-70b-layer": Shape("llama", 8192, 28672, 1, 64, 8, 128, 256, False, 131072),
    "llama-3.1-8b": Shape("llama", 4096, 14336, 32, 32, 8, 128, 128256, False, 131072),
    "llama-3.2-1b": Shape("llama", 2048, 8192, 16, 32, 8, 64, 128256, True, 131072),
    "llama-3.2-3b": Shape("llama", 3072, 8192, 28, 24, 8, 128, 128256, True, 131072),
    "qwen2.5-0.5b": Shape("qwen2", 896, 4864, 24, 14, 2, 64, 151936, True, 32768),
    "qwen2.5-1.5b": Shape("qwen2", 1536, 8960, 28, 12, 2, 128, 151936, True, 32768),
    "qwen2.5-7b": Shape("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, False, 32768),
    "qwen3-0.6b": Shape("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True, 40960),
    "qwen3-1.7b": Shape("qwen3", 2048, 6144, 28, 16, 8, 128, 151936, True, 40960),
    "qwen3-4b": Shape("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, True, 40960),
    "qwen3-8b": Shape("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, False, 40960),
    "smollm2-135m": Shape("llama", 576, 1536, 30, 9, 3, 64, 49152, True, 8192),
    "smollm2-360m": Shape("llama", 960, 2560, 32, 15, 5, 64, 49152, True, 8192),
    "smollm2-1.7b": Shape("llama", 2048, 8192, 24, 32, 32, 64, 49152, True, 8192),
}


def find_shape(name: str) -> Shape:
    """The shape of that name.

    Raises:
        UsageError: there is none.
    """
    if name.lower() not in _SHAPES:
        raise UsageError(
            "There is no such shape.",
            where="--shape",
            observed=name,
            expected=", ".join(_SHAPES),
        )
    return _SHAPES[name.lower()]


def is_shape(name: str) -> bool:
    """Whether `find_shape` knows the name."""
    return name.lower() in _SHAPES


def fill_randomly_(model: nn.Module, dtype: Any) -> None:
    """Give a model of `Shape.empty_model` random weights in memory, the same ones each time.

    A matrix repeats one block of a million normal numbers, so that 8 billion are there in seconds;
    gains are 1 and permutations are random. Its text is nonsense, its speed is the real one's.

    Args:
        model: changed in place.
        dtype: of the weights, a torch dtype.
    """
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(_SEED)
    block = torch.randn(_FILL_BLOCK, generator=generator).mul_(0.02).to(dtype)
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                values = _filled(parameter.shape, block)
                made[id(parameter)] = nn.Parameter(values, requires_grad=False)
            module._parameters[name] = made[id(parameter)]
        permutation = module._buffers.get("permutation")
        if permutation is not None:
            order = torch.randperm(len(permutation), generator=generator, dtype=torch.int32)
            module._buffers["permutation"] = order


def _filled(shape: Any, block: Any) -> Any:
    """A tensor of that shape: ones for a vector, repeats of the block for a matrix."""
    import torch

    if len(shape) < 2:
        return torch.ones(shape, dtype=block.dtype)
    flat = torch.empty(shape, dtype=block.dtype).view(-1)
    for start in range(0, len(flat), len(block)):
        piece = flat[start : start + len(block)]
        piece.copy_(block[: len(piece)])
    return flat.view(shape)
