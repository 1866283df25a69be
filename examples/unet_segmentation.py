r"""A small U-Net of your own: segmentation with DDF and DDF-Up instead of convolutions and interpolations.

    python examples/unet_segmentation.py

It draws its own images, so that nothing is downloaded, and takes a minute or two on a CPU. It writes the converted
model, an image, and predictions.png to the folder of --output. To look at the filters afterwards, in the folder of this
file:

    python unet_segmentation.py
    ddf-convert visualize shapes/model shapes/image.png --model unet_segmentation:UNet --plain --input-size 3 64 64 \
        -o filters.png
"""

import argparse
from pathlib import Path

import PIL.Image
import timm
import torch
import torch.nn.functional as F
from timm.scheduler import create_scheduler_v2
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

import ddf_convert as ddf

CLASSES = ("background", "disc", "square", "triangle")
COLORS = ((0.93, 0.93, 0.93), (0.84, 0.15, 0.16), (0.12, 0.47, 0.71), (0.17, 0.63, 0.17))

# The loop computes the loss of the task, since labels of pixels are no class scores of images; the recipe computes what
# the new layers learn from the old ones.
RECIPE = ddf.recipes.Recipe.model_validate(
    {
        "name": "segmentation",
        "conversion": {"affine": True, "mixing": "dense", "upsample": True},
        "initialize": {"method": "calibrate", "num_images": 32, "steps": 8},
        "stages": [
            {
                "name": "everything",
                "trainable": "all",
                "steps": 150,
                "batch_size": 8,
                "optimizer": {"opt": "adamw", "lr": 2e-3, "weight_decay": 0.01, "old_lr_scale": 0.5},
                "schedule": {"sched": "cosine", "warmup_steps": 10},
                "losses": {"task": 0, "features": 0.2},
                "clip": {"value": 1.0},
            }
        ],
    }
)


class UNet(nn.Module):
    """Two scales down, and up again by bilinear interpolation."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down1 = block(3, width)
        self.down2 = block(width, 2 * width)
        self.middle = block(2 * width, 4 * width)
        self.up2 = nn.Upsample(scale_factor=2, mode="bilinear")
        self.join2 = block(6 * width, 2 * width)
        self.up1 = nn.Upsample(scale_factor=2, mode="bilinear")
        self.join1 = block(3 * width, width)
        self.head = nn.Conv2d(width, len(CLASSES), 1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) from 0 to 1, H and W divisible by 4 -> (B, classes, H, W)."""
        fine = self.down1(image)
        middle = self.down2(F.max_pool2d(fine, 2))
        coarse = self.middle(F.max_pool2d(middle, 2))
        middle = self.join2(torch.cat([middle, self.up2(coarse)], 1))
        return self.head(self.join1(torch.cat([fine, self.up1(middle)], 1)))


def block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def shapes(count: int, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws images (count, 3, size, size) from 0 to 1, with the class of each pixel (count, size, size).

    Discs are plain, squares have stripes and triangles dots, of any color and at any angle.
    """

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=random)

    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    rough = F.interpolate(uniform(count, 3, size // 8, size // 8), (size, size), mode="bicubic").clamp(0, 1)
    images, classes = 0.4 * rough, torch.zeros(count, size, size, dtype=torch.long)
    for image, label in zip(images, classes, strict=True):
        for kind in (1 + torch.randperm(3, generator=random)).tolist():
            center, radius = uniform(2, low=0.15, high=0.85) * size, uniform(1, low=0.14, high=0.22) * size
            angle = uniform(1, high=6.2832)
            dy, dx = y - center[0], x - center[1]
            u, v = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()
            inside, light = {
                "disc": (dx.square() + dy.square() < radius.square(), torch.ones_like(u)),
                "square": (torch.maximum(u.abs(), v.abs()) < 0.85 * radius, (u / 2.5).floor() % 2),
                "triangle": (
                    torch.maximum(v, 0.87 * u.abs() - 0.5 * v) < 0.6 * radius,
                    ((u / 3).floor() % 2) * ((v / 3).floor() % 2),
                ),
            }[CLASSES[kind]]
            image[:, inside] = uniform(3, 1, low=0.5) * (0.35 + 0.65 * light[inside])
            label[inside] = kind
    return (images + 0.06 * torch.randn(images.shape, generator=random)).clamp(0, 1), classes


def intersection_over_union(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    """Returns the mean over the classes."""
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in images.split(16)])
    masks = [(found == kind, classes == kind) for kind in range(len(CLASSES))]
    return sum(float((mine & true).sum() / (mine | true).sum().clamp(min=1)) for mine, true in masks) / len(masks)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, size: int, random: torch.Generator, loss_of
) -> None:
    """Trains on new images in every step, with a cosine schedule and a short warmup."""
    warmup = {"warmup_epochs": 0.2, "warmup_lr": 1e-4, "warmup_prefix": False}
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=1, step_on_epochs=False, updates_per_epoch=steps, **warmup
    )
    for step in range(steps):
        images, classes = shapes(8, size, random)
        loss = loss_of(images, classes)
        optimizer.zero_grad()
        loss.backward()
        dispatch_clip_grad(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step_update(step + 1)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            print(f"  step {step + 1}: loss {loss.item():.3f}", flush=True)


def draw(file: Path, images: Tensor, rows: list[tuple[str, Tensor]]) -> None:
    """Draws images and the classes that each model sees in them."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    palette = torch.tensor(COLORS)
    shown = [("image", images.movedim(1, -1)), *((name, palette[classes]) for name, classes in rows)]
    figure = Figure(figsize=(1.9 * len(images) + 0.4, 1.9 * len(shown) + 0.7), layout="constrained")
    axes = figure.subplots(len(shown), len(images), squeeze=False)
    for row, (name, pictures) in zip(axes, shown, strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture.numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=11)
    patches = [
        Patch(facecolor=color, edgecolor="gray", label=name) for name, color in zip(CLASSES, COLORS, strict=True)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(CLASSES), frameon=False)
    figure.savefig(file, dpi=110)


def main(arguments: list[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="rows, and columns, of the images")
    parser.add_argument("--steps", type=int, default=150, help="of the original, and of the converted model")
    parser.add_argument("--output", type=Path, default=Path("shapes"))
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    random = torch.Generator().manual_seed(1)
    test_images, test_classes = shapes(64, args.size, torch.Generator().manual_seed(2))

    print("the original learns")
    original = UNet().train()
    optimizer = torch.optim.AdamW(original.parameters(), 8e-3, weight_decay=0.01)

    def task_loss(images: Tensor, classes: Tensor) -> Tensor:
        return F.cross_entropy(original(images), classes)

    train(original, optimizer, args.steps, args.size, random, task_loss)
    scores = {"original": intersection_over_union(original, test_images, test_classes)}

    example = test_images[:1]
    plan = ddf.plan(original, example, **RECIPE.options())
    print(plan)
    model = ddf.convert(original, plan)
    RECIPE.initialize(model, original, [shapes(16, args.size, random)[0] for _ in range(2)])
    scores["converted"] = intersection_over_union(model, test_images, test_classes)

    print("the converted model learns, from the labels and from the original")
    (stage,) = RECIPE.changed(steps=args.steps).stages
    groups = RECIPE.parameter_groups(model, stage)
    optimizer = timm.optim.create_optimizer_v2(groups, opt=stage.optimizer.opt, lr=stage.optimizer.lr)
    objective = RECIPE.losses(model, stage, teacher=original).train()

    def loss_of(images: Tensor, classes: Tensor) -> Tensor:
        result = objective(images)
        return result["loss"] + F.cross_entropy(result["output"], classes)

    train(model, optimizer, args.steps, args.size, random, loss_of)
    scores["trained"] = intersection_over_union(model, test_images, test_classes)

    for name, score in scores.items():
        print(f"IoU {name}: {100 * score:.1f} %")
    args.output.mkdir(parents=True, exist_ok=True)
    ddf.save(model.eval(), args.output / "model")
    with torch.no_grad():
        rows = [
            (name, each.eval()(test_images[:6]).argmax(1)) for name, each in (("original", original), ("DDF", model))
        ]
    draw(args.output / "predictions.png", test_images[:6], [("truth", test_classes[:6]), *rows])
    pixels = (255 * test_images[0].movedim(0, -1)).round().byte().numpy()
    PIL.Image.fromarray(pixels).save(args.output / "image.png")
    print(f"saved to {args.output}")
    return model


if __name__ == "__main__":
    main()
