"""Run a model over data and measure how often each of its neurons is silent.

`profile` counts at the model's activation sites: on the tensors that the activation functions return, wherever and
however often they are called. Every site's counts go to the neurons whose labels reach it (`_graph.py`).
"""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.progress import Progress
from torch import Tensor, nn

from torchtrim import _shards
from torchtrim._checkpoint import Checkpoint, Reached
from torchtrim._classes import Labels
from torchtrim._forward import Forward
from torchtrim._pass import Pass
from torchtrim._profile import Profile
from torchtrim._progress import displayed
from torchtrim._stable import Stable
from torchtrim._watch import Watch
from torchtrim.errors import ProfileError, TorchtrimWarning


def profile(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None = None,
    *,
    through_norms: bool = False,
    zero_tolerance: float = 0.0,
    until: Stable | None = None,
    sharded: bool = True,
    checkpoint: str | Path | None = None,
    every: int = 100,
    progress: bool | Progress = False,
    classes: Labels | bool = False,
) -> Profile:
    """Measure every neuron of a model over data, in one pass, in evaluation mode and without gradients.

    batches: any iterable, such as a DataLoader. A batch that is a tensor is the model's input; of a tuple or list the
    first element is; a mapping holds keyword inputs. `forward=lambda model, batch: ...` calls the model otherwise.
    Tensors are moved to where the model is. Memory does not grow with the data. through_norms: as for `trace`; a plan
    that is selected from the profile has it too. zero_tolerance: after activations that give no exact zeros (GELU,
    SiLU, tanh, sigmoid), what counts as zero, as a share of the root mean square of the tensor's values in the first
    batch; such as 0.01. until: when to stop before the data end; the profile then has `in_doubt`.

    classes: measure each class apart too, in `Profile.classes`; True takes the labels from batches (inputs, labels), a
    function gives those of a batch, a whole number or a word for each example.

    checkpoint: a file that holds the pass so far, written every `every` batches. A call with a file that is there goes
    on after the last of them, so that the data must come in the same order; it ends with the same integers, and with
    the same bits where the batches between two writes are the same. The file of a pass that ended is its profile, which
    a further call returns at once; delete it to measure anew. progress: whether to show a line in the terminal, or the
    display to show it in. An interrupt (Ctrl-C) ends the pass with the batches counted so far and marks the profile
    `partial`; without any it goes on as KeyboardInterrupt.

    In a process group of several processes (`torchrun`, `accelerate launch`) each gives its shard of the data, which
    may be empty, and gets the profile of all shards, equal to the last bit; sharded=False measures each on its own. A
    first batch is that of the first process that has one. Each keeps a checkpoint of its own, with its number at the
    end of the name; an interrupt of one is an error of all. A model in DistributedDataParallel is measured without it.

    A `TorchtrimWarning` says where the figures are uncertain or say little. The first axis of the first input is taken
    for the examples; every APoZ has a standard error, in which what happens within an example is one observation.

    The model is left as it was found: modes, gradients, hooks and random state.
    Raises ProfileError: no batches, a batch that does not fit the model, an activation that is NaN or infinite; the
    message names the batch, and the layer where there is one; and the process, on all of them. Raises PlanError: layers
    that `until` names and that cannot be trimmed. Raises StoreError: a
    checkpoint of another model, asked otherwise, or of other data; a file that cannot be written.
    """
    if isinstance(batches, Tensor):
        raise ProfileError(
            "batches: expected an iterable of batches, found a tensor, whose rows it would give; pass [it]"
        )
    check_tolerance(zero_tolerance)
    shared = sharded and _shards.several()
    if until and (shared or checkpoint is not None):
        other = "several processes that share a pass; pass sharded=False" if shared else "a checkpoint; leave one out"
        raise ProfileError(f"until: expected one pass from beginning to end, found {other}")
    model = _shards.unwrapped(model)
    file = None
    if checkpoint is not None:
        asked = {"through_norms": through_norms, "zero_tolerance": zero_tolerance, "classes": bool(classes)}
        file = Checkpoint(checkpoint, every, model, **asked)
    watch = Watch(model, through_norms=through_norms, zero_tolerance=zero_tolerance)
    one = Pass(model, forward, watch, file, until, classes, shared=shared)
    with displayed(False if shared and _shards.rank() else progress) as display:
        found = _shards.together(lambda: one.over(batches, display)) if shared else one.over(batches, display)
    if found is None:
        raise ProfileError("expected at least one batch, found none; look at what the loader yields")
    if file and shared and not _shards.rank():
        file.write(Reached(found, 0, (0, ""), watch.limits))
    for note in found.notes:
        warnings.warn(note, TorchtrimWarning, stacklevel=2)
    return found


def check_tolerance(zero_tolerance: float) -> None:
    """Raise the ProfileError that `profile` would raise for this tolerance, before anything is measured."""
    if not 0 <= zero_tolerance < float("inf"):
        raise ProfileError(f"zero_tolerance: expected a share of the root mean square, found {zero_tolerance!r}")
