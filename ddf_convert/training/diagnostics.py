"""What can go wrong in a step, in words that say where, and which knob to turn."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ddf_convert.errors import DDFError
from ddf_convert.recipes.schema import Stage

# What torch says on the CPU, where running out of memory has no exception of its own.
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|cannot allocate memory|std::bad_alloc", re.IGNORECASE)
_WORKER_DIED = re.compile(r"DataLoader worker.*(killed by signal|exited unexpectedly)", re.IGNORECASE | re.DOTALL)


def not_finite(stage: Stage, step: int, what: str, where: str, lr: float) -> DDFError:
    """The error for a loss or a gradient that is infinite or no number.

    Args:
        stage: In which it happened.
        step: Of the stage, from 1.
        what: What is not finite.
        where: Where that began.
        lr: The learning rate then.
    """
    knobs = [f"a lower learning rate (--lr, now {lr:.2g})"]
    if stage.clip is None:
        knobs.append("clipped gradients (clip: {value: 1.0} in the recipe's stage)")
    if stage.amp == "float16":
        knobs.append("--amp bfloat16, whose numbers reach further than float16's")
    elif stage.amp == "bfloat16":
        knobs.append("--amp none")
    return DDFError(f"stage {stage.name!r}, step {step}: {what}; {where}; try {', or '.join(knobs)}")


def first_not_finite(model: nn.Module, images: Tensor) -> str | None:
    """Runs a model with an eye on every module, and names the first whose output is not finite.

    Args:
        model: The model.
        images: Its input.

    Returns:
        Its name and class; None if all outputs are finite.
    """
    found: list[str] = []

    def watch(name: str, module: nn.Module) -> Any:
        def look(module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found and not all(_is_finite(tensor) for tensor in _tensors(output)):
                found.append(f"{name or 'the model'} ({type(module).__name__})")

        return module.register_forward_hook(look)

    with torch.no_grad(), ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(watch(name, module).remove)
        model(images)
    return found[0] if found else None


def where_it_began(model: nn.Module, teacher: nn.Module | None, images: Tensor) -> str:
    """Where a loss that is not finite began, in words: in the images, the weights, a layer, the original or the loss.

    Args:
        model: It is run once more.
        teacher: So is this one, if need be.
        images: The batch.
    """
    if not _is_finite(images):
        return "the images themselves hold numbers that are not finite"
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not _is_finite(tensor):
            return f"{name} was not finite before this step"
    if (layer := first_not_finite(model, images)) is not None:
        return f"it began in the output of {layer}"
    if teacher is not None and (layer := first_not_finite(teacher, images)) is not None:
        return f"it began in the original model, in the output of {layer}"
    return "every layer's output is finite, and so it began in the loss itself"


def gradient_not_finite(parameters: Iterable[tuple[str, nn.Parameter]]) -> str:
    """Names the first parameter, from the model's output backwards, whose gradient is not finite."""
    named = [name for name, each in parameters if each.grad is not None and not _is_finite(each.grad)]
    return f"it began at the gradient of {named[-1]}" if named else "no single gradient is: their norm overflows"


@contextmanager
def memory_explained(batch_size: int, accumulate: int | None = None, amp: bool = False) -> Iterator[None]:
    """A context in which running out of memory says which knob to turn.

    Args:
        batch_size: Images at a time.
        accumulate: Batches a step; None if nothing is trained.
        amp: Whether a half type is in use already.

    Raises:
        DDFError: Memory ran out.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _no_memory(error, batch_size, accumulate, amp) from error
    except RuntimeError as error:
        if _NO_MEMORY.search(str(error)):
            raise _no_memory(error, batch_size, accumulate, amp) from error
        if _WORKER_DIED.search(str(error)):
            raise DDFError(
                "a process that loads images died, most often because memory (or /dev/shm) ran out: fewer of them"
                " (--workers 1, or 0), or a smaller --batch-size"
            ) from error
        raise


def _no_memory(error: BaseException, batch_size: int, accumulate: int | None, amp: bool) -> DDFError:
    where = "the GPU's memory" if "CUDA" in str(error) else "memory"
    knobs = []
    if batch_size > 1:
        halved = f"--batch-size {max(1, batch_size // 2)}"
        if accumulate is not None:
            halved += f" --accumulate {accumulate * 2}, which keeps the images of a step"
        knobs.append(halved)
    if accumulate is not None and not amp:
        knobs.append("--amp bfloat16")
    knobs.append("a smaller --input-size")
    return DDFError(f"{where} ran out with batches of {batch_size}: try {', or '.join(knobs)}")


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)
