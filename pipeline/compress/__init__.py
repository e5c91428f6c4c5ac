"""From a model to a compressed checkpoint; can be called: `pipeline.compress(model, folder)`."""

from pipeline.lazy import make_callable

make_callable(__name__, "pipeline.face:compress")
