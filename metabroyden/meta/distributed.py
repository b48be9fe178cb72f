"""One meta-training in several processes: each takes an equal share of every batch, their gradients are averaged.

Started by torchrun, which says through the environment how many there are and where they meet. Whatever is random is
drawn for the whole batch in every process (`metabroyden.meta.estimators`), so their number changes nothing but rounding.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


def rank() -> int:
    """Which process this is, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def resolve(device: str) -> torch.device:
    """The device of a name, "auto" being a GPU where there is one; with several processes each takes its own.

    ValueError for a name that torch does not know, or a GPU where there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but torch sees no GPU here")
    if found == torch.device("cuda"):
        found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return found


def join(device: torch.device) -> bool:
    """Join the other processes, by NCCL on GPUs and else by gloo, until this one ends; returns whether that was done now.

    Nothing happens where torchrun is not, nor where there is a group of processes already. A group that was left cannot be
    joined again under the same torchrun, so that a library function joins for good.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not dist.is_available() or dist.is_initialized():
        return False
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    atexit.register(_leave)
    return True


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Join the other processes while it lasts: for a command, which does so once."""
    joined = join(device)
    try:
        yield
    finally:
        if joined:
            _leave()


def part(batch: int) -> slice:
    """This process's rows of a batch; ValueError where they cannot be shared out equally."""
    if batch % size():
        raise ValueError(f"a batch of {batch} cannot be shared out equally by {size()} processes")
    share = batch // size()
    return slice(rank() * share, (rank() + 1) * share)


def spread(module: nn.Module) -> nn.Module:
    """A module whose gradients are averaged over the processes as they are made; itself where there is one process.

    Every segment of an unroll leaves some parameters unused (the initializer all but the first), hence the search for them.
    """
    if size() == 1:
        return module
    wrapped = DistributedDataParallel(module, find_unused_parameters=True)
    wrapped.broadcast_buffers = False  # an attribute in every release of torch; the option of this name warns in some
    return wrapped


def mean(value: Tensor) -> Tensor:
    """The mean over processes of a tensor."""
    if size() > 1:
        value = value.clone()
        dist.all_reduce(value)
        value = value / size()
    return value


def from_first(values: Sequence[float]) -> list[float]:
    """The numbers that the first process has."""
    if size() == 1:
        return list(values)
    shared = torch.tensor(values, dtype=torch.float64, device=_device())
    dist.broadcast(shared, 0)
    return shared.tolist()


def by_first(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, which alone calls it, in all of them; what it raises is raised in all.

    For what takes timings or reads from a loader, which would differ from process to process.
    """
    if size() == 1:
        return make()
    found: list[Any] = [None, None]
    if rank() == 0:
        try:
            found[0] = make()
        except Exception as error:
            found[1] = error
    dist.broadcast_object_list(found, 0)
    if found[1] is not None:
        raise found[1]
    return found[0]


def wait() -> None:
    """Until all processes are here."""
    from_first([0.0])


def agree(what: str, value: float) -> None:
    """RuntimeError, in all processes, where they have different values."""
    if size() > 1 and mean(torch.tensor([float(from_first([value])[0] != value)], device=_device())) > 0:
        raise RuntimeError(f"processes differ from the first in {what}: do all see the same files?")


def _device() -> torch.device:
    """Where tensors must be that processes exchange."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
