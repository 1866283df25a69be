"""Patch a network of your own: plan, read, edit, convert, compare, save, restore.

python examples/own_network.py --output own-network
"""

import argparse

import torch
from torch import Tensor, nn

import ddf_convert as ddf


class Residual(nn.Module):
    """Two convolutions, with a convolution around them."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, feature: Tensor) -> Tensor:
        inside = self.norm1(self.conv1(feature)).relu()
        return (self.norm2(self.conv2(inside)) + self.skip(feature)).relu()


class Net(nn.Module):
    """A network of your own: nothing in it knows of ddf_convert."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.stages = nn.Sequential(Residual(32, 32), Residual(32, 64, 2), Residual(64, 128, 2))
        self.head = nn.Linear(128, classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(image).relu()).mean((2, 3)))


def main(arguments: list[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="own-network")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    net, image = Net().eval(), torch.randn(1, 3, 64, 64)

    # Plan: what would be replaced, and why. Nothing is changed yet.
    plan = ddf.plan(net, image)
    print(plan, end="\n\n")

    # Read: every decision is data. Edit: override one.
    for site in plan.replaced:
        saved = 1 - site.after.macs / site.before.macs
        print(f"{site.name}: {100 * saved:.0f} % fewer MACs, because {site.reason}")
    plan["stages.0.conv1"].skip("details of the image are lost here first")

    # Convert: a copy; inplace=True would change net itself.
    converted = ddf.convert(net, plan).eval()

    # Compare: parameters, MACs, activations and times, in all and by layer.
    difference = ddf.compare(net, converted, image)
    print()
    print(difference)

    # Save, and restore into a fresh instance: a program with the class Net needs nothing else.
    ddf.save(converted, args.output)
    again = ddf.restore(Net(), args.output).eval()
    with torch.no_grad():
        same = torch.equal(again(image), converted(image))
    print(f"\nsaved to {args.output}; restored, its outputs are equal: {same}")
    return again


if __name__ == "__main__":
    main()
