"""The graph of an image classifier, through torch's own exporter."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import InputError
from pipeline.export.contract import Profile
from pipeline.export.trace_decoder import quiet_exporter, traced_with
from pipeline.export.tracing import traced_as_nodes
from pipeline.model.load_classifier import Shape
from pipeline.vision.attention import NAME, active_profile

INPUT, OUTPUT, BATCH = "pixel_values", "logits", "batch_size"
# More than one, and no number that a dimension of the model is likely to have.
TRACE_BATCH = 3


class Classify(nn.Module):
    """Pixel values in, logits out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits [B, classes] of pixel values [B, C, H, W]."""
        return self.model(pixel_values=pixel_values).logits


def trace_classifier(model: PreTrainedModel, shape: Shape, profile: Profile) -> ir.Model:
    """Export a classifier with a dynamic batch; linear layers are nodes of their own.

    Args:
        model: its dtype becomes that of the graph.
        shape: channels, height and width.
        profile: which operators.

    Raises:
        InputError: the exporter cannot handle the model.
    """
    pixels = torch.zeros(TRACE_BATCH, *shape, dtype=model.dtype)
    token = active_profile.set(profile)
    try:
        with traced_with(model, NAME), quiet_exporter(), torch.no_grad():
            # Once as it is: a Swin settles the sizes of its windows in its first call.
            model(pixel_values=pixels)
            with traced_as_nodes():
                program = torch.onnx.export(
                    Classify(model).eval(),
                    (pixels,),
                    dynamo=True,
                    opset_version=profile.opset,
                    dynamic_shapes={INPUT: {0: BATCH}},
                    input_names=[INPUT],
                    output_names=[OUTPUT],
                    optimize=True,
                    verify=False,
                )
    except Exception as error:
        raise InputError(
            "The model cannot be exported to ONNX.",
            where=type(model).__name__,
            observed=(str(error).strip().splitlines() or [type(error).__name__])[0],
            change="run again with -v to see the exporter's own traceback",
        ) from error
    finally:
        active_profile.reset(token)
    model_ir: ir.Model = program.model  # type: ignore[union-attr]  # None without dynamo only
    return model_ir
