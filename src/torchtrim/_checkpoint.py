"""How far a pass over data came, in a file from which another process goes on."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchtrim._copies import named_tensors
from torchtrim._files import write_whole
from torchtrim._profile import Profile
from torchtrim._watch import Limits
from torchtrim.errors import ProfileError, StoreError


@dataclass(frozen=True)
class Reached:
    """How far a pass over data came.

    profile: of what was counted; `partial` while the pass goes on. batches: how many of the data's. mark: the number
    of one of them, and a digest of its tensors. limits: as `Watch.limits`.
    """

    profile: Profile
    batches: int
    mark: tuple[int, str]
    limits: Limits


class Checkpoint:
    """The file of one pass, a profile that says how far the pass came.

    every: batches from one time to the next that it is written. asked: what else `profile` was asked, by name.
    """

    def __init__(self, path: str | Path, every: int, model: nn.Module, **asked: Any) -> None:
        if every < 1:
            raise ProfileError(f"every: expected 1 or more batches from one checkpoint to the next, found {every!r}")
        self.path, self.every = Path(path), every
        self._facts = {"weights": _digest(named_tensors(model)), **asked}

    def read(self) -> Reached | None:
        """How far the pass came; None if there is no file. Raises StoreError: it is of something else."""
        if not self.path.exists():
            return None
        profile = Profile.load(self.path)
        with safe_open(str(self.path), "numpy") as file:
            content = json.loads(file.metadata()["torchtrim"]).get("pass")
        if content is None:
            raise StoreError(f"{self.path}: expected a checkpoint, found a profile without one; choose another file")
        facts = content["facts"]
        differs = [
            f"other {key}" if key == "weights" else f"{key}={facts.get(key)!r} instead of {value!r}"
            for key, value in self._facts.items()
            if facts.get(key) != value
        ]
        if differs:
            raise StoreError(
                f"{self.path}: expected a pass over this model, measured in this way, found {', '.join(differs)}; "
                "delete the file to measure anew, or choose another"
            )
        limits = {(index, operator, module): limit for index, operator, module, limit in content["limits"]}
        return Reached(profile, content["batches"], tuple(content["mark"]), limits)

    def write(self, reached: Reached) -> None:
        """Keep it in the file, which is whole at any moment. Raises StoreError."""
        content = {
            "facts": self._facts,
            "batches": reached.batches,
            "mark": reached.mark,
            "limits": [[*key, limit] for key, limit in reached.limits.items()],
        }
        write_whole(self.path, reached.profile.packed({"pass": content}))

    def of_process(self, number: int, count: int) -> "Checkpoint":
        """The file of a process that shares the pass."""
        mine = object.__new__(Checkpoint)
        vars(mine).update(vars(self), path=self.path.with_name(f"{self.path.name}.{number}-of-{count}"))
        return mine

    def check(self, mark: tuple[int, str], number: int, batch: Any) -> None:
        """Raise StoreError if the batch has the number of the mark, and is another."""
        if number == mark[0] and digest_of(batch) != mark[1]:
            raise StoreError(
                f"{self.path}: batch {number} is another than the one that was counted; give the same data in the same "
                "order (no shuffling, the same batch size), or delete the file to measure anew"
            )

    def too_few(self, counted: int, number: int) -> StoreError:
        """The error that the data end before what was counted."""
        return StoreError(
            f"{self.path}: expected the data of which {counted} batches were counted, found {number} batches; give the "
            "same data, or delete the file to measure anew"
        )


def digest_of(batch: Any) -> str:
    """A digest of a batch's tensors and arrays."""
    leaves = enumerate(pytree.tree_leaves(batch))
    arrays = {
        str(place): torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf
        for place, leaf in leaves
        if isinstance(leaf, Tensor) or (isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf")
    }
    return _digest(arrays)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors.items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
