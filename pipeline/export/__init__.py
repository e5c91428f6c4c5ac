"""From a checkpoint to one ONNX graph; can be called: `pipeline.export(checkpoint, folder)`."""

from pipeline import face

face.make_callable(__name__, face.export)
