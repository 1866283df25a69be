"""The filters of a model's DDF layers for an image, as tensors, numbers and pictures."""

from ddf_convert.visualize.capture import filters
from ddf_convert.visualize.layer_filters import Components, Dynamics, LayerFilters, change, components, strength
from ddf_convert.visualize.photos import as_batch, read_photo, settings_of, shown
from ddf_convert.visualize.picture import encoded, picture, spread

__all__ = [
    "Components",
    "Dynamics",
    "LayerFilters",
    "as_batch",
    "change",
    "components",
    "encoded",
    "filters",
    "picture",
    "read_photo",
    "settings_of",
    "shown",
    "spread",
    "strength",
]
