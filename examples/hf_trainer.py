"""A recipe under the Trainer of Hugging Face's transformers.

    pip install transformers accelerate
    python examples/hf_trainer.py --data FOLDER --model resnet18 --pretrained

FOLDER holds train/CLASS/*.jpg.
"""

import argparse

import timm
import torch
from transformers import Trainer, TrainingArguments

import ddf_convert as ddf


class RecipeTrainer(Trainer):
    """A Trainer with the recipe's losses and parameter groups."""

    def __init__(self, recipe, stage, original, **options):
        super().__init__(**options)
        self.recipe, self.stage = recipe, stage
        # For several processes, wrap objective.trainable_module, which the loss calls, instead of the model.
        self.objective = recipe.losses(self.model, stage, teacher=original).to(self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        self.objective.train()
        result = self.objective(inputs["images"], inputs["labels"])
        return (result["loss"], {"logits": result["output"]}) if return_outputs else result["loss"]

    def create_optimizer(self, model=None):
        images = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        groups = self.recipe.parameter_groups(self.model, self.stage, images)
        self.optimizer = timm.optim.create_optimizer_v2(
            groups, opt=self.stage.optimizer.opt, lr=self.stage.optimizer.lr
        )
        return self.optimizer


def collate(samples):
    """Makes a batch with the names that the Trainer passes on."""
    images, labels = zip(*samples, strict=True)
    return {"images": torch.stack(images), "labels": torch.tensor(labels)}


def main(arguments: list[str] | None = None) -> torch.nn.Module:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100, help="of each stage")
    parser.add_argument("--output", default="hf-trainer")
    args = parser.parse_args(arguments)

    original = timm.create_model(args.model, pretrained=args.pretrained).eval()
    recipe = ddf.recipes.load("quick").changed(steps=args.steps, batch_size=args.batch_size)
    model = recipe.convert(original, torch.randn(1, 3, args.size, args.size))
    recipe.initialize(model, original)

    dataset = timm.data.create_dataset("", root=args.data, split="train", is_training=True)
    dataset.transform = timm.data.create_transform(args.size, is_training=True)
    for stage in recipe.stages:
        trainer = RecipeTrainer(
            recipe,
            stage,
            original,
            model=model,
            train_dataset=dataset,
            data_collator=collate,
            args=TrainingArguments(
                output_dir=f"{args.output}-checkpoints",
                max_steps=stage.steps,
                per_device_train_batch_size=args.batch_size,
                dataloader_drop_last=True,
                lr_scheduler_type="cosine",
                warmup_steps=stage.schedule.warmup_steps,
                max_grad_norm=stage.clip.value,
                remove_unused_columns=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
        )
        result = trainer.train()
        print(f"{stage.name}: loss {result.training_loss:.4f}")

    ddf.save(model.cpu().eval(), args.output)
    print(f"saved to {args.output}")
    return model


if __name__ == "__main__":
    main()
