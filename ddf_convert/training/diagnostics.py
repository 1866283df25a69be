"""Errors of training steps, explained: where they began, and which option may help."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ddf_convert.errors import DDFError, first_line, ran_out_of_memory
from ddf_convert.recipes.schema import Stage
from ddf_convert.utils.capture import forward_hooks


def not_finite(stage: Stage, step: int, what: str, where: str, lr: float) -> DDFError:
    """Returns the error for a loss or a gradient that is not finite; ``step`` is that of the stage, from 1."""
    options = [f"a lower learning rate (--lr, now {lr:.2g})"]
    if stage.clip is None:
        options.append("clipped gradients (clip: {value: 1.0} in the recipe's stage)")
    if stage.amp == "float16":
        options.append("--amp bfloat16, whose numbers reach further than float16's")
    elif stage.amp == "bfloat16":
        options.append("--amp none")
    return DDFError(f"stage {stage.name!r}, step {step}: {what}; {where}; try {', or '.join(options)}")


def first_not_finite(model: nn.Module, images: Tensor) -> str | None:
    """Runs a model and returns name and class of the first module whose output is not finite; None if there is none."""
    found: list[str] = []

    def check(name: str, module: nn.Module, _args: Any, output: Any) -> None:
        if not found and not all(_is_finite(each) for each in tree_leaves(output) if isinstance(each, Tensor)):
            found.append(f"{name or 'the model'} ({type(module).__name__})")

    hooks = ((module, partial(check, name)) for name, module in model.named_modules())
    with torch.no_grad(), forward_hooks(hooks):
        model(images)
    return found[0] if found else None


def where_it_began(model: nn.Module, teacher: nn.Module | None, images: Tensor) -> str:
    """Says where a loss that is not finite began: in the images, the weights, a layer, the original or the loss.

    It runs the model, and possibly the teacher, once more.
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
    """A context that explains running out of memory, and the death of a DataLoader worker, by a DDFError.

    Args:
        batch_size: Images at a time.
        accumulate: Batches a step; None if nothing is trained.
        amp: Whether mixed precision is used already.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if ran_out_of_memory(error):
            raise _no_memory(error, batch_size, accumulate, amp) from error
        if (explained := worker_death(error)) is not None:
            raise explained from error
        raise


def worker_death(error: Exception) -> DDFError | None:
    """Returns the error to raise for one that means that a DataLoader worker died; None if it means something else.

    Besides the loader itself, any line of the run can raise this error: torch raises it from a signal handler. In a
    loader, an ``OSError`` or ``EOFError`` is a connection to the worker that broke off.
    """
    reported = isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
    raised_by_worker = "Caught" in str(error)
    if not (reported or isinstance(error, (OSError, EOFError))) or raised_by_worker:
        return None
    return DDFError(
        f"a process that loads images died ({first_line(error)}), most often because memory (or /dev/shm) ran out: try"
        " --workers 1 (or 0), or a smaller --batch-size"
    )


def _no_memory(error: BaseException, batch_size: int, accumulate: int | None, amp: bool) -> DDFError:
    where = "the GPU's memory" if "CUDA" in str(error) else "memory"
    options = []
    if batch_size > 1:
        halved = f"--batch-size {max(1, batch_size // 2)}"
        if accumulate is not None:
            halved += f" --accumulate {accumulate * 2}, which keeps the images of a step"
        options.append(halved)
    if accumulate is not None and not amp:
        options.append("--amp bfloat16")
    options.append("a smaller --input-size")
    return DDFError(f"{where} ran out with batches of {batch_size}: try {', or '.join(options)}")


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
