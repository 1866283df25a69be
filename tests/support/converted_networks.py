"""Small models of the usual families, converted. Other processes import this file too, so it needs no pytest."""

import copy
from functools import cache, partial

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import ddf_convert as ddf
from ddf_convert.layers import DDF2d, DDFConv2d

SIZE = 40  # odd maps on the way down (20, 10, 5, 3, 2), and more than one pixel in the last


def stage(inputs, outputs):
    layers = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Encoder, decoder, concatenated skips, bilinear upsampling to whatever size the skip has."""

    def __init__(self, widths=(16, 24, 32), classes=2):
        super().__init__()
        self.encoder = nn.ModuleList(map(stage, (3, *widths[:-2]), widths[:-1]))
        self.middle = stage(widths[-2], widths[-1])
        ups, skips = widths[:0:-1], widths[-2::-1]
        self.decoder = nn.ModuleList(stage(up + skip, skip) for up, skip in zip(ups, skips, strict=True))
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x):
        skips = []
        for encode in self.encoder:
            skips.append(encode(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.middle(x)
        for decode, skip in zip(self.decoder, reversed(skips), strict=True):
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            x = decode(torch.cat([skip, x], 1))
        return self.head(x)


def resnet(name, **options):
    """A narrow one whose blocks all count from the start: timm begins with the last norm of each at zero."""
    return timm.create_model(name, num_classes=5, channels=(16, 24, 32, 48), zero_init_last=False, **options)


# How to build it, how to convert it, and how many DDF layers that makes.
FAMILIES = {
    "mobilenet": (partial(timm.create_model, "mobilenetv2_050", num_classes=5), {"depthwise": True}, 17),
    "basic blocks": (partial(resnet, "resnet10t"), {}, 9),
    "bottlenecks": (partial(resnet, "resnet26"), {}, 8),
    "unet": (UNet, {"stem": True}, 10),
}


def build(family):
    torch.manual_seed(0)
    return FAMILIES[family][0]()


def convert(model, family, **options):
    return ddf.convert(model, example_input=torch.empty(1, 3, SIZE, SIZE), **FAMILIES[family][1], **options)


@cache
def _converted(family):
    model = convert(build(family), family).train()
    for layer in model.modules():
        if isinstance(layer, DDF2d):
            # Filters that owe as much to their biases as to the image. Those of new layers owe all to it, so that the
            # output is a product of three features, and a relative error grows to 1.7 times its size in every layer.
            for part in (layer.spatial_branch[0], layer.channel_branch[3]):
                nn.init.normal_(part.bias)
            nn.init.ones_(layer.channel_branch[1].bias)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momentum = {norm.momentum for norm in norms}.pop()
    for value in (1, momentum):  # statistics of one batch, so that outputs in evaluation mode are of size 1
        for norm in norms:
            norm.momentum = value
        if value == 1:
            model(images(8, seed=9))
    return model.eval()


def converted(family):
    """A converted model with batch norm statistics of its own, in evaluation mode."""
    return copy.deepcopy(_converted(family))


def images(count=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, SIZE, SIZE, generator=generator, dtype=torch.float32, device="cpu")


def ddf_layers(model):
    """The outermost DDF layers, by name."""
    inside = {id(layer.ddf) for layer in model.modules() if isinstance(layer, DDFConv2d)}
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, DDF2d | DDFConv2d) and id(layer) not in inside
    }


def gradients(model, call, image):
    """The output, the gradient of the image and those of the parameters, for one uneven gradient of the output."""
    image = image.detach().requires_grad_()
    output = call(image)
    grad = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).to(output.dtype).view(output.shape)
    found = torch.autograd.grad(output, [image, *(p for p in model.parameters() if p.requires_grad)], grad)
    return [output.detach(), *found]


def train_in_parallel(rank, families, folder):
    """One of two processes under DistributedDataParallel, each with half of the images."""
    torch.set_num_threads(1)  # as the tests do
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for family in families:
        model = converted(family).train()
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # a parameter without a gradient is an error in the second pass
            parallel.zero_grad()
            parallel(images(4)[2 * rank : 2 * rank + 2]).square().mean().backward()
        torch.save(
            {name: parameter.grad for name, parameter in model.named_parameters()}, f"{folder}/{family} {rank}.pt"
        )
    dist.destroy_process_group()
