"""Several processes as torchrun starts them: sums over all of them, and an error in one that ends all, reported once.

A single process is a world of 1, with the same calls.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import distribute_bn
from torch import Tensor, nn

from ddf_convert.errors import DDFError, UsageError
from ddf_convert.utils.device import choose

_TIMEOUT_S = timedelta(seconds=5)  # to wait for the name of the process that failed, when the connection is gone
_FAILED = "failed"
_UNREACHABLE = ("connection", "gloo", "nccl", "broken pipe", "timed out", "reset by peer", "socket")


class PeerFailedError(DDFError):
    """Another process of this run failed, and reports why itself."""

    reported_elsewhere = True


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Returns the sum over all processes, the same tensor in each."""
        if self.world == 1:
            return values
        summed = values.detach().clone().to(self.device)
        dist.all_reduce(summed)
        return summed.to(values.device)

    def any(self, flag: bool) -> bool:
        """Returns whether a flag is true in any process."""
        if self.world == 1:
            return flag
        return bool(self.total(torch.tensor(float(flag))) > 0)

    def gathered(self, values: Tensor) -> list[Tensor]:
        """Returns the tensors of all processes, which have one shape, on the CPU, by rank."""
        if self.world == 1:
            return [values.detach().cpu()]
        mine = values.detach().to(self.device).contiguous()
        all_of_them = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(all_of_them, mine)
        return [each.cpu() for each in all_of_them]

    def wait(self) -> None:
        """Waits until all processes are here."""
        self.any(False)

    def share_batch_norms(self, *models: nn.Module) -> None:
        """Sets the running statistics of batch norms to their mean over the processes."""
        if self.world > 1:
            for model in models:
                distribute_bn(model, self.world, reduce=True)


@contextmanager
def joined(device: str | None = None) -> Iterator[Processes]:
    """A context in which this process is one of those that torchrun started, or the only one.

    A process group that exists already is used; else one is made, and destroyed at the end.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size(), _choose_device(device, _local_rank()))
        return
    if world == 1:
        yield Processes(0, 1, _choose_device(device, 0))
        return
    rank = int(os.environ["RANK"])
    try:
        where = _choose_device(device, _local_rank(), several=True)
        if where.type == "cuda":
            torch.cuda.set_device(where)
            dist.init_process_group("nccl", device_id=where)
        else:
            dist.init_process_group("gloo")
        yield Processes(rank, world, where)
        dist.destroy_process_group()  # not after an error: that would wait for processes that no longer answer
    except PeerFailedError:
        raise
    except Exception as error:
        if not _is_lost_connection(error):
            _publish(rank)
            raise
        if _failed_elsewhere(rank):
            raise PeerFailedError("another process of this run failed") from error
        _publish(rank)
        raise DDFError(
            f"process {rank} lost the others ({str(error).splitlines()[0]}): one was killed, or its machine went away;"
            " start again with --resume"
        ) from error


def first_to_report(message: str) -> bool:
    """Returns whether no other process has reported this: an error that all of them meet is printed once."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    store = _store()
    if store is None:
        return True
    try:
        times: int = store.add(_key(hashlib.sha256(message.encode()).hexdigest()), 1)
        return times == 1
    except (RuntimeError, dist.DistError):
        return True


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _choose_device(name: str | None, local_rank: int, several: bool = False) -> torch.device:
    if several and name is not None and name.startswith("cuda:"):
        raise UsageError(f"--device {name}: every process takes a GPU of its own; give cuda")
    gpus = torch.cuda.device_count()
    if several and name in (None, "cuda") and 0 < gpus <= local_rank:
        raise UsageError(
            f"process {local_rank} of this machine finds no GPU: there are {gpus}; start as many processes"
        )
    return choose(name, local_rank, "trained on")


# --- the store that torchrun keeps outlives the process that fails ---


def _store() -> Any:
    """Returns a connection to torchrun's store; None if there is none."""
    try:
        return dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=_TIMEOUT_S,
            wait_for_workers=False,
        )
    except (KeyError, ValueError, RuntimeError, dist.DistError):
        return None


def _key(name: str) -> str:
    """Returns a key of this attempt: torchrun keeps the store when it restarts the processes."""
    return f"ddf_convert/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"


def _publish(rank: int) -> None:
    store = _store()
    if store is not None:
        with suppress(RuntimeError):
            store.compare_set(_key(_FAILED), "", str(rank))


def _failed_elsewhere(rank: int) -> bool:
    store = _store()
    if store is None:
        return False
    try:
        store.wait([_key(_FAILED)], _TIMEOUT_S)
        first: str = store.get(_key(_FAILED)).decode()
        return first != str(rank)
    except (RuntimeError, dist.DistError):
        return False


def _is_lost_connection(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _UNREACHABLE)
