"""A pass over data that several processes share: each measures its shard, and all get the profile of the whole."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchtrim._profile import Profile, difference
from torchtrim.errors import ProfileError, TorchtrimWarning


@dataclass(frozen=True)
class _Failure:
    """Why a process has no profile."""

    message: str


class _KnownError(ProfileError):
    """What all processes have been told of."""


def several() -> bool:
    """Whether there is a process group of more than one process, as under `torchrun`."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """The number of this process; 0 where there is one."""
    return dist.get_rank() if several() else 0


def place() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    return rank(), dist.get_world_size()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without the wrapper that keeps its copies alike in training."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def together(work: Callable[[], Profile | None]) -> Profile | None:
    """The profile of all shards, of which `work` measures this process's; None where no process has one.

    Parts are added up in the order of the processes, so that each gets the same bits. Raises ProfileError on all
    processes where `work` fails, or is interrupted, on one.
    """
    cause = None
    try:
        found = work()
        mine = _Failure("interrupted") if found is not None and found.partial else found
    except _KnownError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        cause = error
        text = str(error) if isinstance(error, ProfileError) else f"{type(error).__name__}: {error}"
        mine = _Failure("interrupted" if isinstance(error, KeyboardInterrupt) else text)
    everyone = _gathered(mine, cause)
    measured = [(number, one) for number, one in enumerate(everyone) if one is not None]
    return _merged(measured) if measured else None


def agreed(mine: Mapping[Any, Any]) -> dict[Any, Any]:
    """What the processes know, each by its keys: of one key, what the first process knows. All must ask, inside
    `together`.
    """
    known: dict[Any, Any] = {}
    for one in reversed(_gathered(dict(mine))):
        known |= one
    return known


def _gathered(mine: Any, cause: BaseException | None = None) -> list[Any]:
    """What every process passes, in the order of their numbers; each waits until all have come.

    Where one has failed, all raise the same error.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    failed = [
        f"process {number} of {len(everyone)}: {one.message}"
        for number, one in enumerate(everyone)
        if isinstance(one, _Failure)
    ]
    if failed:
        raise _KnownError("\n".join(failed)) from cause
    return everyone


def _merged(measured: list[tuple[int, Profile]]) -> Profile:
    (first, whole), *others = measured
    for number, other in others:
        if differs := difference(whole, other):
            raise ProfileError(
                f"process {number}: expected the model of process {first}, measured in one way, found {differs}; give "
                "all processes one model"
            )
    if others and all(_equal(whole, other) for _, other in others):
        warnings.warn(
            f"all {len(measured)} processes measured the same data, so that each example counts {len(measured)} times; "
            "give each a shard of its own, or pass sharded=False",
            TorchtrimWarning,
            stacklevel=4,
        )
    return whole.merge(*(other for _, other in others))


def _equal(one: Profile, other: Profile) -> bool:
    """Whether the sums of all activations are equal to the last bit, which other data do not give."""
    sums = [torch.cat([part.counts.total for part in each._parts]) for each in (one, other)]
    return torch.equal(*sums)
