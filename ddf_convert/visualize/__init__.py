"""Looks at what dynamic filters do: the filters of a model's DDF layers for an image, as tensors, numbers, pictures."""

from ddf_convert.visualize.capture import LayerFilters, filters
from ddf_convert.visualize.components import Components, components
from ddf_convert.visualize.dynamics import Dynamics
from ddf_convert.visualize.maps import change, strength
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
