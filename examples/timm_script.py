r"""timm's own train.py and validate.py fine-tune and measure a converted model.

The scripts are in timm's repository, and not in the package that pip installs:

    git clone --depth 1 --branch v1.0.31 https://github.com/huggingface/pytorch-image-models
    cp pytorch-image-models/train.py pytorch-image-models/validate.py .

A DDF-ResNet needs no more than the launcher, which registers it in timm and runs the script:

    python -m ddf_convert.models.launch train.py --model ddf_mul_resnet18 --data-dir FOLDER --num-classes 10

A converted folder of a timm model needs a name in timm too. This file gives it one, `converted`, and runs the script:

    ddf-convert convert resnet50 --pretrained --recipe preserve -o resnet50-ddf
    python examples/timm_script.py resnet50-ddf train.py --model converted --data-dir FOLDER --num-classes 10 \
        --opt adamw --lr 5e-4 --epochs 20 --experiment fine
    python examples/timm_script.py resnet50-ddf validate.py --model converted --data-dir FOLDER --num-classes 10 \
        --checkpoint output/train/fine/model_best.pth.tar

On several GPUs: torchrun --nproc-per-node 4 examples/timm_script.py resnet50-ddf train.py ... What timm's checkpoints
hold becomes a converted folder again with --collect:

    python examples/timm_script.py --collect output/train/fine/model_best.pth.tar --output resnet50-fine resnet50-ddf

It has no losses against the original model and no stages: `ddf-convert finetune` has them.
"""

import argparse
import sys

import timm
import torch
from timm.models import load_checkpoint, register_model

import ddf_convert as ddf
from ddf_convert.artifacts import artifact
from ddf_convert.models import launch

WEIGHT_OPTIONS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")  # the folder has the weights


def register(folder: str) -> None:
    """Makes `timm.create_model("converted")` the model of a folder, with its weights."""
    source = artifact.read_manifest(folder).source
    if source.kind != "timm":
        sys.exit(f"error: {folder} holds a model of your own: only timm's models have timm's options")

    def converted(num_classes: int | None = None, **options) -> torch.nn.Module:
        # The original takes options such as drop_rate; the classifier is changed after the weights are loaded.
        options = {name: value for name, value in options.items() if name not in WEIGHT_OPTIONS}
        model = ddf.restore(timm.create_model(source.name, **{**source.kwargs, **options}), folder)
        if num_classes not in (None, model.num_classes):
            model.reset_classifier(num_classes)
        return model

    converted.__module__ = __name__
    register_model(converted)


def collect(folder: str, checkpoint: str, output: str) -> None:
    """Writes what timm's script has trained as a converted folder."""
    state = timm.models.load_state_dict(checkpoint, use_ema=True)
    classifier = timm.create_model("converted").pretrained_cfg["classifier"]
    model = timm.create_model("converted", num_classes=len(state[f"{classifier}.weight"]))
    load_checkpoint(model, checkpoint, use_ema=True)
    ddf.save(model.eval(), output)
    print(f"saved to {output}")


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="that `ddf-convert convert` wrote")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="and its arguments")
    parser.add_argument("--collect", metavar="FILE", help="a checkpoint of the script")
    parser.add_argument("--output", help="folder for what is in it")
    args = parser.parse_args(given)
    register(args.folder)
    if args.collect:
        collect(args.folder, args.collect, args.output or sys.exit("error: --collect needs --output"))
    else:
        launch.main(args.script)


if __name__ == "__main__":
    main()
