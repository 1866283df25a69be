"""A recipe in a training loop of your own: convert, keep what the model knows, learn the rest from the original.

    python examples/own_loop.py --data FOLDER --model resnet18 --pretrained

FOLDER holds train/CLASS/*.jpg. Labels are not used: the recipe `distill` learns from the original model.
"""

import argparse
from itertools import chain, islice, repeat

import timm
import torch
from timm.utils import dispatch_clip_grad

import ddf_convert as ddf


def main(arguments: list[str] | None = None) -> torch.nn.Module:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100, help="of each stage")
    parser.add_argument("--output", default="own-loop")
    args = parser.parse_args(arguments)

    original = timm.create_model(args.model, pretrained=args.pretrained).eval()
    dataset = timm.data.create_dataset("", root=args.data, split="train", is_training=True)
    dataset.transform = timm.data.create_transform(args.size, is_training=True)
    loader = torch.utils.data.DataLoader(dataset, args.batch_size, shuffle=True, drop_last=True)

    recipe = ddf.recipes.load("distill").changed(steps=args.steps, batch_size=args.batch_size)
    model = recipe.convert(original, torch.randn(1, 3, args.size, args.size))
    report = recipe.initialize(model, original, loader, num_images=32)
    for layer in report.layers:
        print(f"{layer.name}: relative error {layer.output_error:.2f}, fitted {layer.fitted_error:.2f}")

    for stage in recipe.stages:
        groups = recipe.parameter_groups(model, stage, images_per_step=args.batch_size)  # freezes what does not learn
        optimizer = timm.optim.create_optimizer_v2(groups, opt=stage.optimizer.opt, lr=stage.optimizer.lr)
        objective = recipe.losses(model, stage, teacher=original).train()
        endless = chain.from_iterable(repeat(loader))
        for step, (images, _) in enumerate(islice(endless, stage.steps), start=1):
            loss = objective(images)["loss"]
            optimizer.zero_grad()
            loss.backward()
            dispatch_clip_grad(model.parameters(), stage.clip.value, stage.clip.mode)
            optimizer.step()
            if step % 10 == 0 or step == stage.steps:
                print(f"{stage.name}, step {step}: loss {loss.item():.4f}")

    ddf.save(model.eval(), args.output)
    print(f"saved to {args.output}")
    return model


if __name__ == "__main__":
    main()
