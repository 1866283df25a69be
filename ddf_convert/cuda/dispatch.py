"""From tensors to launches: which kernel a call takes, its tiles and its grid."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ddf_convert.cuda.variants import (
    CHUNK,
    FASTEST_STRIDE,
    UNROLLED,
    WARP,
    FilterGradients,
    Norm,
    Plain,
    Q,
    Variant,
    Window,
    lanes_dividing,
)

_BLOCKS_EACH = 4  # blocks that each multiprocessor should have at least, where the work can be split that far
_FAR = 2**31  # pixels of a plane, and blocks of a grid, that 32 bits can count
_ALIGNED = 16  # bytes of the widest load


def forward(
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    combine: str,
    layout: torch.memory_format,
    norm_scale: float | None = None,
) -> Tensor:
    """See :func:`ddf_convert.ops.ddf`; the arguments have been checked. The output has ``layout``.

    Args:
        input: As there.
        channel_filter: As there.
        spatial_filter: As there.
        stride: As there.
        padding: As there.
        dilation: As there.
        combine: As there.
        layout: Of the output: that of the input.
        norm_scale: Apply FilterNorm with this scale to the spatial filter first; None: take it as it is.
    """
    shape = (*input.shape[:2], *spatial_filter.shape[-2:])
    output = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)
    if output.numel() == 0:
        return output
    call = _Call(input, channel_filter, spatial_filter, stride, padding, dilation, combine, layout)
    if call.is_fast():
        call.window(output, call.input, gradient=False, norm_scale=norm_scale)
        return output
    if norm_scale is not None:
        taps = call.size**2
        call.spatial_filter = filter_norm(spatial_filter, taps, norm_scale, layout)
    call.plain("forward", output, call.input, call.channel_filter, call.spatial_filter, count=output.numel())
    return output


def backward(
    grad_output: Tensor,
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    combine: str,
    needs: tuple[bool, bool, bool],
    layout: torch.memory_format,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (input, channel_filter, spatial_filter); those not needed have no elements.

    The arguments have been checked. The gradients of the maps have ``layout``.
    """
    grads = [input.new_empty(0) for _ in range(3)]
    call = _Call(input, channel_filter, spatial_filter, stride, padding, dilation, combine, layout)
    grad_output = grad_output.contiguous(memory_format=layout)
    if needs[0]:
        grads[0] = call.grad_input(grad_output)
    if needs[1] or needs[2]:
        grad_channel, grad_spatial = call.grad_filters(grad_output, needs[1], needs[2])
        if needs[1]:
            grads[1] = grad_channel
        if needs[2]:
            grads[2] = grad_spatial
    return grads[0], grads[1], grads[2]


def filter_norm(filters: Tensor, taps: int, scale: float, layout: torch.memory_format) -> Tensor:
    """FilterNorm over the taps of (B, G*taps, H, W), in float32 (float64 for float64); keeps dtype and layout."""
    filters = filters.contiguous(memory_format=layout)
    result = torch.empty_like(filters, memory_format=layout)
    _normalise(Norm(_dtype(filters), add=False, gradient=False), (result, filters), taps, scale, layout)
    return result


def filter_norm_backward(grad: Tensor, filters: Tensor, taps: int, scale: float, layout: torch.memory_format) -> Tensor:
    """The gradient of the filters, given that of :func:`filter_norm`."""
    filters = filters.contiguous(memory_format=layout)
    grad = grad.contiguous(memory_format=layout)
    result = torch.empty_like(filters, memory_format=layout)
    _normalise(Norm(_dtype(filters), add=False, gradient=True), (result, grad, filters), taps, scale, layout)
    return result


def _normalise(
    variant: Norm, tensors: tuple[Tensor, ...], taps: int, scale: float, layout: torch.memory_format
) -> None:
    _, channels, height, width = tensors[0].shape
    count = tensors[0].numel() // taps
    if count == 0:
        return
    pixels = height * width
    steps = (1, channels) if layout == torch.channels_last else (pixels, 1)
    numbers = (scale, count, pixels, channels // taps, taps, channels * pixels, *steps)
    _run(variant, tensors[0].device, _blocks(count, variant.threads), (*tensors, *numbers))


class _Call:
    """What all kernels of one call are told."""

    def __init__(
        self,
        input: Tensor,
        channel_filter: Tensor,
        spatial_filter: Tensor,
        stride: int,
        padding: int,
        dilation: int,
        combine: str,
        layout: torch.memory_format,
    ) -> None:
        self.input = input.contiguous(memory_format=layout)
        self.channel_filter = channel_filter.contiguous()
        self.spatial_filter = spatial_filter.contiguous(memory_format=layout)
        self.layout = layout
        self.channels_last = layout == torch.channels_last
        self.device = input.device
        self.dtype = _dtype(input)
        self.add = combine == "add"
        self.batch, self.channels, self.height, self.width = input.shape
        self.out_height, self.out_width = spatial_filter.shape[-2:]
        self.size = channel_filter.shape[-1]
        self.heads = spatial_filter.shape[1] // self.size**2
        self.per_head = self.channels // self.heads
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.sums = torch.float64 if input.dtype == torch.float64 else torch.float32
        self.most_pixels = 2 if self.dtype == "float64" else 4  # that a tile holds in registers along a row

    def is_fast(self) -> bool:
        """Whether the unrolled kernels take this call; the plain ones take any."""
        small = max(self.height * self.width, self.out_height * self.out_width) < _FAR
        return small and self.size in UNROLLED[self.dtype] and self.stride <= FASTEST_STRIDE

    def lanes(self, *widths: int, tensors: tuple[Tensor, ...] = ()) -> int:
        """The most elements of one load in maps with rows (or channels) of these lengths."""
        aligned = all(tensor.data_ptr() % _ALIGNED == 0 for tensor in tensors)
        return lanes_dividing(*widths) if aligned else 1

    # --- the forward pass and the gradient of the input ---------------------------------------------------------------

    def grad_input(self, grad_output: Tensor) -> Tensor:
        gradient = torch.empty_like(self.input, memory_format=self.layout)
        if gradient.numel() == 0:
            return gradient
        if grad_output.numel() == 0:
            return gradient.zero_()
        if self.is_fast():
            self.window(gradient, grad_output, gradient=True)
        else:
            tensors = (gradient, grad_output, self.channel_filter, self.spatial_filter)
            self.plain("grad_input", *tensors, count=gradient.numel())
        return gradient

    def window(self, target: Tensor, source: Tensor, gradient: bool, norm_scale: float | None = None) -> None:
        """Launches the window kernel: ``target`` from ``source``."""
        step_out = self.stride if gradient else 1
        down, across = (-(-size // step_out) for size in target.shape[-2:])
        tensors = (target, source)
        wide = lanes_dividing(target.shape[-1], most=4) if self.stride == 1 or gradient else lanes_dividing(across)
        columns = min(self.most_pixels, 4 if self.channels_last else max(1, wide // step_out))
        if self.size == 7 or step_out > 1:
            columns = min(columns, 2)
        groups = self._groups(target, columns, step_out) if self.channels_last else 4
        variant = Window(
            dtype=self.dtype,
            add=self.add,
            size=self.size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            channels_last=self.channels_last,
            gradient=gradient,
            normalise=norm_scale is not None,
            columns=columns,
            source_lanes=1 if self.channels_last else self.lanes(source.shape[-1], tensors=tensors),
            target_lanes=1 if self.channels_last else self.lanes(target.shape[-1], columns * step_out, tensors=tensors),
            channel_lanes=self.lanes(self.per_head, tensors=tensors) if self.channels_last else 1,
            whole=self.per_head % Q == 0,
            groups=groups,
        )
        tiles = _blocks(down, variant.rows) * _blocks(across, columns)
        blocks_of_tiles = _blocks(tiles, variant.tiles)
        step = groups * Q
        chunk = step if self.channels_last else CHUNK[self.size]
        images = self.batch * self.heads
        while chunk > step and images * blocks_of_tiles * _blocks(self.per_head, chunk) < self._enough():
            chunk //= 2
        blocks = images * blocks_of_tiles * _blocks(self.per_head, chunk)
        numbers = (
            norm_scale or 1.0,
            *(self.channels, self.heads, down, across, *target.shape[-2:], *source.shape[-2:]),
            *(self.out_height, self.out_width, chunk),
        )
        _run(variant, self.device, blocks, (target, source, self.channel_filter, self.spatial_filter, *numbers))

    def _groups(self, target: Tensor, columns: int, step_out: int) -> int:
        """Groups of channels side by side in a channels_last block: few enough that all multiprocessors have work."""
        groups = 4
        while groups < WARP and groups * Q < min(self.per_head, CHUNK[self.size]):
            groups *= 2
        down, across = (-(-size // step_out) for size in target.shape[-2:])
        tiles = self.batch * self.heads * _blocks(down, 2) * _blocks(across, columns)
        while groups > 4 and tiles * _blocks(self.per_head, groups * Q) // 16 < self._enough():
            groups //= 2
        return groups

    def _enough(self) -> int:
        return _BLOCKS_EACH * multiprocessors(self.device)

    # --- the gradients of the filters ---------------------------------------------------------------------------------

    def grad_filters(self, grad_output: Tensor, channel: bool, spatial: bool) -> tuple[Tensor, Tensor]:
        """Both, where the fast kernel makes them in one pass; else those that are wanted."""
        if grad_output.numel() == 0:
            empty = torch.empty_like(self.spatial_filter, memory_format=self.layout)
            return torch.zeros_like(self.channel_filter), empty.zero_()
        if self.is_fast():
            return self._grad_filters_at_once(grad_output)
        grad_channel, grad_spatial = self.channel_filter, self.spatial_filter
        if channel:
            grad_channel = torch.empty_like(self.channel_filter)
            tensors = (grad_channel, grad_output, self.input, self.spatial_filter)
            self.plain("grad_channel", *tensors, count=grad_channel.numel())
        if spatial:
            grad_spatial = torch.empty_like(self.spatial_filter, memory_format=self.layout)
            tensors = (grad_spatial, grad_output, self.input, self.channel_filter)
            self.plain("grad_spatial", *tensors, count=grad_spatial.numel())
        return grad_channel, grad_spatial

    def _grad_filters_at_once(self, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        most = {3: 4, 5: 2, 7: 1}[self.size] // (2 if self.dtype == "float64" else 1) or 1
        along = self.per_head if self.channels_last else self.out_width
        lanes = min(most, self.lanes(along, tensors=(grad_output, self.input, self.spatial_filter)))
        while self.channels_last and lanes > 1 and WARP * lanes > self.per_head:
            lanes //= 2
        variant = FilterGradients(
            dtype=self.dtype,
            add=self.add,
            size=self.size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            channels_last=self.channels_last,
            lanes=lanes,
            source_lanes=1 if self.channels_last else self.lanes(self.width, tensors=(self.input,)),
        )
        images = self.batch * self.heads
        groups = self.out_height * _blocks(self.out_width, variant.pixels)
        if self.channels_last:
            chunk, span = WARP * lanes, WARP * variant.warps
            while (
                span > variant.warps and images * _blocks(self.per_head, chunk) * _blocks(groups, span) < self._enough()
            ):
                span //= 2
        else:
            chunk, span = CHUNK[self.size], WARP
            least = 2 * variant.warps * variant.steps
            while chunk > least and images * _blocks(self.per_head, chunk) * _blocks(groups, span) < self._enough():
                chunk //= 2
        chunks, spans = _blocks(self.per_head, chunk), _blocks(groups, span)
        channel_parts = self.input.new_empty((spans, *self.channel_filter.shape), dtype=self.sums)
        batch, taps, height, width = self.spatial_filter.shape
        shape = (height, width, taps) if self.channels_last else (taps, height, width)
        spatial_parts = self.input.new_empty((chunks, batch, *shape), dtype=self.sums)
        tensors = (channel_parts, spatial_parts, grad_output, self.input, self.channel_filter, self.spatial_filter)
        sizes = (self.batch, self.channels, self.heads, self.out_height, self.out_width, self.height, self.width)
        _run(variant, self.device, images * chunks * spans, (*tensors, *sizes, chunk, span))
        dtype = self.input.dtype
        grad_channel = _total(channel_parts).to(dtype)
        grad_spatial = _total(spatial_parts).to(dtype)
        return grad_channel, grad_spatial.permute(0, 3, 1, 2) if self.channels_last else grad_spatial

    # --- anything -----------------------------------------------------------------------------------------------------

    def plain(self, function: str, target: Tensor, *tensors: Tensor, count: int) -> None:
        """Launches a plain kernel with a thread for each of ``count`` elements."""
        variant = Plain(self.dtype, self.add, function)
        numbers = (
            *(count, self.channels, self.heads, self.height, self.width, self.out_height, self.out_width),
            *(self.size, self.stride, self.padding, self.dilation),
            *self._strides(self.channels, self.height, self.width),
            *self._strides(self.channels, self.out_height, self.out_width),
            *self._strides(self.heads * self.size**2, self.out_height, self.out_width),
        )
        _run(variant, self.device, _blocks(count, variant.threads), (target, *tensors, *numbers))

    def _strides(self, channels: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Elements from one image, channel, row and column to the next."""
        if self.channels_last:
            return channels * height * width, 1, width * channels, channels
        return channels * height * width, height * width, width, 1


def _total(parts: Tensor) -> Tensor:
    """The parts that blocks have made, added in one order."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def _blocks(items: int, each: int) -> int:
    return -(-items // each)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; for the simulator, which has none, a few."""
    if device.type != "cuda":
        return 2
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _run(variant: Variant, device: torch.device, blocks: int, arguments: tuple[Any, ...]) -> None:
    if device.type == "cuda":
        from ddf_convert.cuda import launch

        launch.run(variant, device.index, blocks, arguments)
    else:
        from ddf_convert.cuda import simulated

        simulated.simulate(variant, blocks, arguments)
