"""Image classifiers: what is different from decoders in loading, measuring and exporting them."""
