"""Reads photos and prepares them for a model: cropped and normalized, and back again to be shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import PIL.Image
import torch
from torch import Tensor, nn

from ddf_convert.training.dataloader import ImageSettings, image_settings, make_transform
from ddf_convert.utils.images import open_image, to_rgb


def read_photo(file: Path) -> PIL.Image.Image:
    """Reads an image file of any kind that PIL knows, in RGB, turned as its EXIF orientation says.

    Raises:
        UsageError: It is missing, or is no image.
    """
    return to_rgb(open_image(file, exif_orientation=True))


def settings_of(model: nn.Module, input_size: tuple[int, int, int] | None = None, plain: bool = False) -> ImageSettings:
    """Returns how images are prepared for a model, from what timm knows of it.

    Args:
        model: Any module.
        input_size: (C, H, W), instead of the model's own.
        plain: Values from 0 to 1, not normalized, and cropped only to the aspect ratio: for models trained so.

    Raises:
        UsageError: It takes neither 1 nor 3 channels.
    """
    settings = image_settings(model, input_size)
    channels = settings.input_size[0]
    return replace(settings, mean=(0.0,) * channels, std=(1.0,) * channels, crop_pct=1.0) if plain else settings


def as_batch(photos: Sequence[PIL.Image.Image], settings: ImageSettings) -> Tensor:
    """Returns photos as the model takes them: (B, C, H, W) float32."""
    transform = make_transform(settings)
    return torch.stack([transform(photo) for photo in photos])


def shown(image: Tensor, settings: ImageSettings) -> Tensor:
    """Undoes the normalization: (C, H, W) -> (H, W, 3) from 0 to 1, for people to see."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (settings.mean, settings.std))
    return (image.cpu() * std + mean).clamp(0, 1).expand(3, -1, -1).movedim(0, -1)
