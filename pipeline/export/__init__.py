"""From a checkpoint to one ONNX graph; can be called: `pipeline.export(checkpoint, folder)`."""

from pipeline.lazy import make_callable

make_callable(__name__, "pipeline.face:export")
