"""timm's own parts from end to end: its loader, loss, optimizer and schedule train a DDF-ResNet or a converted model.

    python examples/timm_loop.py --data FOLDER --model ddf_mul_resnet18 --epochs 5
    python examples/timm_loop.py --data FOLDER --converted resnet50-ddf --epochs 5

FOLDER holds train/CLASS/*.jpg and validation/CLASS/*.jpg. timm's train.py and validate.py need no change either:

    python -m ddf_convert.models.launch train.py --model ddf_mul_resnet18 --data-dir FOLDER
"""

import argparse

import timm
import torch
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy

import ddf_convert as ddf


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default="ddf_mul_resnet18")
    which.add_argument("--converted", help="a folder that `ddf-convert convert` wrote")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args(arguments)

    train, validation = (
        timm.data.create_dataset("", root=args.data, split=split, is_training=split == "train")
        for split in ("train", "validation")
    )
    classes = len(train.reader.class_to_idx)
    if args.converted:
        model = ddf.load(args.converted)
        model.reset_classifier(classes)
    else:
        model = timm.create_model(args.model, num_classes=classes)

    settings = {
        "input_size": (3, args.size, args.size),
        "batch_size": args.batch_size,
        "use_prefetcher": False,
        "num_workers": 0,
        "device": torch.device("cpu"),
    }
    loader = timm.data.create_loader(train, is_training=True, **settings)
    evaluation = timm.data.create_loader(validation, is_training=False, **settings)
    # FilterNorm's scales are vectors: timm leaves vectors out of weight decay by itself.
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(
        optimizer, num_epochs=args.epochs, step_on_epochs=False, updates_per_epoch=len(loader)
    )
    criterion = timm.loss.LabelSmoothingCrossEntropy(0.1)

    updates, top1 = 0, AverageMeter()
    for epoch in range(args.epochs):
        model.train()
        for images, targets in loader:
            loss = criterion(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updates += 1
            scheduler.step_update(updates)
        model.eval()
        top1.reset()
        with torch.inference_mode():
            for images, targets in evaluation:
                top1.update(accuracy(model(images), targets)[0].item(), len(targets))
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, top-1 {top1.avg:.1f} %")
    return top1.avg


if __name__ == "__main__":
    main()
