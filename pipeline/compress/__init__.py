"""From a model to a compressed checkpoint; can be called: `pipeline.compress(model, folder)`."""

from pipeline import face

face.make_callable(__name__, face.compress)
