"""A recipe under Lightning: the module asks the recipe for its parameter groups and its losses.

    pip install lightning
    python examples/lightning_loop.py --data FOLDER --model resnet18 --pretrained

FOLDER holds train/CLASS/*.jpg.
"""

import argparse

import lightning
import timm
import torch
from timm.scheduler import create_scheduler_v2

import ddf_convert as ddf


class Stage(lightning.LightningModule):
    """One stage of a recipe."""

    def __init__(self, recipe, stage, model, original, updates):
        super().__init__()
        self.recipe, self.stage, self.model, self.updates = recipe, stage, model, updates
        self.objective = recipe.losses(model, stage, teacher=original)

    def on_train_start(self):
        self.objective.train()  # Lightning leaves modes as they are; the original stays in evaluation mode

    def training_step(self, batch, _):
        images, targets = batch
        result = self.objective(images, targets)
        self.log("loss", result["loss"], prog_bar=True)
        return result["loss"]

    def configure_optimizers(self):
        groups = self.recipe.parameter_groups(self.model, self.stage, images_per_step=self.stage.batch_size)
        optimizer = timm.optim.create_optimizer_v2(groups, opt=self.stage.optimizer.opt, lr=self.stage.optimizer.lr)
        scheduler, _ = create_scheduler_v2(
            optimizer, self.stage.schedule.sched, num_epochs=1, step_on_epochs=False, updates_per_epoch=self.updates
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def lr_scheduler_step(self, scheduler, _):
        scheduler.step_update(self.global_step)  # timm's schedules count steps themselves


def main(arguments: list[str] | None = None) -> torch.nn.Module:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100, help="of each stage")
    parser.add_argument("--output", default="lightning-loop")
    args = parser.parse_args(arguments)

    original = timm.create_model(args.model, pretrained=args.pretrained).eval()
    recipe = ddf.recipes.load("quick").changed(steps=args.steps, batch_size=args.batch_size)
    model = recipe.convert(original, torch.randn(1, 3, args.size, args.size))
    recipe.initialize(model, original)

    dataset = timm.data.create_dataset("", root=args.data, split="train", is_training=True)
    dataset.transform = timm.data.create_transform(args.size, is_training=True)
    loader = torch.utils.data.DataLoader(dataset, args.batch_size, shuffle=True, drop_last=True)
    for stage in recipe.stages:
        trainer = lightning.Trainer(
            max_steps=stage.steps,
            gradient_clip_val=stage.clip.value,
            accelerator="auto",
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            log_every_n_steps=1,
        )
        trainer.fit(Stage(recipe, stage, model, original, stage.steps), loader)
        print(f"{stage.name}: loss {trainer.callback_metrics['loss']:.4f}")

    ddf.save(model.cpu().eval(), args.output)
    print(f"saved to {args.output}")
    return model


if __name__ == "__main__":
    main()
