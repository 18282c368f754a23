"""One pass of one process over data."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.progress import Progress
from torch import Tensor, nn

from torchtrim import _shards
from torchtrim._checkpoint import Checkpoint, Reached, digest_of
from torchtrim._classes import Labels, in_order, labels_of
from torchtrim._counting import native_room
from torchtrim._forward import Forward, device_of, left_as_found, moved, usual_call
from torchtrim._neurons import NeuronGraph
from torchtrim._parts import Part, added_up, since
from torchtrim._profile import Profile
from torchtrim._progress import shown, uninterrupted
from torchtrim._stable import Stable
from torchtrim._tally import Totals
from torchtrim._unmeasured import unmeasured
from torchtrim._watch import NotFiniteError, Watch
from torchtrim.errors import ProfileError, TraceError


class _Looks:
    """Shows a pass over data to `until` every now and then."""

    def __init__(self, model: nn.Module, until: Stable) -> None:
        self.judge = until.begin()
        self._model, self._every = model, until.every
        self._blank: Profile | None = None
        self._seen: tuple[Part, ...] = ()

    def enough(self, watch: Watch) -> bool:
        """Whether the pass may end."""
        return not watch.batches % self._every and watch.graph is not None and self._look(watch, watch.graph)

    def in_doubt(self, watch: Watch) -> dict[str, tuple[int, ...]]:
        """By layer, the neurons that are not settled; all of them where the data ended before the first look."""
        if not self._seen and watch.graph is not None:
            self._look(watch, watch.graph)
        return self.judge.in_doubt

    def _look(self, watch: Watch, graph: NeuronGraph) -> bool:
        watch.look()
        blank = self._blank = self._blank or unmeasured(self._model, graph)
        before, self._seen = self._seen, _parts(watch, watch.totals())
        so_far, latest = (
            blank.with_parts(parts, 0, zero_tolerance=watch.zero_tolerance)
            for parts in (self._seen, since(before, self._seen))
        )
        return self.judge.look(so_far, latest)


class Pass:
    """One pass of this process over data."""

    def __init__(
        self,
        model: nn.Module,
        forward: Forward | None,
        watch: Watch,
        file: Checkpoint | None,
        until: Stable | None,
        classes: Labels | bool,
        *,
        shared: bool,
    ) -> None:
        self._model, self._forward, self._watch, self._shared = model, forward, watch, shared
        self._classes = classes
        self._file = file.of_process(*_shards.place()) if file and shared else file
        self._device = device_of(model)
        self._reached: Reached | None = None  # what the file holds
        self._mark = 0, ""  # number and digest of a batch, by which the data are known again
        self._blank: Profile | None = None
        self._looks = _Looks(model, until) if until else None

    def over(self, batches: Iterable[Any], progress: Progress) -> Profile | None:
        """What they hold; None if there are none. What there is, `partial`, where an interrupt comes."""
        native_room(self._device.type)  # a way to count that is asked for and missing is known before the first batch
        watch = self._watch
        if self._file and (reached := self._file.read()):
            self._reached, self._mark = reached, reached.mark
            watch.limits, watch.batches = reached.limits, reached.batches
            if not reached.profile.partial:
                self._agree(iter(()))
                return reached.profile
        begun, before = time.perf_counter(), self._examples
        with left_as_found(self._model, self._device), shown(progress, "measuring", _length(batches)) as show:
            try:
                for batch in self._agree(self._left(batches, show)):
                    self._count(batch, watch)
                    self._keep(batch)
                    del batch  # the next is made without it
                    rate = (self._examples - before) / max(time.perf_counter() - begun, 1e-9)
                    show(f", {rate:,.0f} examples/s")
                    if self._looks and self._looks.enough(watch):
                        break
            except KeyboardInterrupt:
                if not self._examples:
                    raise
                return self._save(partial=True)
            return self._save(partial=False)

    @property
    def _examples(self) -> int:
        """How many were counted, by earlier processes too."""
        return self._watch.examples + (self._reached.profile.examples if self._reached else 0)

    def _left(self, batches: Iterable[Any], show: Callable[[str], None]) -> Iterator[Any]:
        """The batches that no earlier process has counted."""
        iterator = iter(batches)
        for number in range(self._watch.batches):
            assert self._file is not None
            if not (passed := list(itertools.islice(iterator, 1))):
                raise self._file.too_few(self._watch.batches, number)
            self._file.check(self._mark, number + 1, passed.pop())
            show("")
        return iterator

    def _agree(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, once all processes that share the pass agree on what counts as zero."""
        watch = self._watch
        if not (self._shared and watch.zero_tolerance):
            return batches
        trial = Watch(self._model, through_norms=watch.through_norms, zero_tolerance=watch.zero_tolerance)
        first = [] if watch.limits else list(itertools.islice(batches, 1))
        if first:
            self._count(first[0], trial)
        watch.limits = _shards.agreed(watch.limits or trial.limits)
        return itertools.chain((first.pop() for _ in range(len(first))), batches)

    def _count(self, batch: Any, watch: Watch) -> None:
        call, number = self._forward or usual_call, watch.batches + 1
        inputs = moved(batch, self._device)
        try:
            labels = labels_of(batch, self._classes) if self._classes else None
            watch.run(lambda: call(self._model, inputs), labels)
        except NotFiniteError:
            raise
        except ProfileError as error:
            raise ProfileError(f"batch {number}: {error}") from error
        except TraceError as error:
            otherwise = "" if self._forward else " To call it otherwise, pass forward=lambda model, batch: ..."
            raise ProfileError(f"batch {number}: {error}{otherwise}") from error

    def _keep(self, batch: Any) -> None:
        """Write the file every now and then."""
        if self._file is None:
            return
        due = self._watch.batches % self._file.every == 0
        if due or not self._mark[0]:
            self._mark = self._watch.batches, digest_of(batch)
        if due:
            self._save(partial=True)

    def _save(self, *, partial: bool) -> Profile | None:
        """The profile of all that was counted, which goes to the file too."""
        watch = self._watch
        watch.look()
        found = self._reached and self._reached.profile
        if watch.examples:
            assert watch.graph is not None
            self._blank = self._blank or unmeasured(self._model, watch.graph)
            blank, tolerance = self._blank, watch.zero_tolerance
            classes = {
                label: blank.with_parts(
                    _parts(watch, watch.classes[label].totals()), examples, zero_tolerance=tolerance
                )
                for label, examples in sorted(watch.class_examples.items(), key=lambda one: in_order(one[0]))
            }
            doubt = self._looks.in_doubt(watch) if self._looks else None
            parts = _parts(watch, watch.totals())
            latest = blank.with_parts(parts, watch.examples, zero_tolerance=tolerance, in_doubt=doubt, classes=classes)
            found = latest if found is None else found.merge(latest)
        elif found is None and watch.batches:
            raise ProfileError("`forward` did not call the model; expected it to call model(...) with the batch")
        if found is None:
            return None
        found.partial = partial
        if self._file:
            reached = Reached(found, watch.batches, self._mark, watch.limits)
            with uninterrupted():
                self._file.write(reached)
                self._reached = reached
                watch.restart()  # stretch by stretch: a pass that was cut between two gives the same bits
        return found


def _length(batches: Iterable[Any]) -> int | None:
    """How many there are; None if they do not know."""
    try:
        return len(batches)  # pyright: ignore[reportArgumentType]
    except (TypeError, NotImplementedError):
        return None


def _parts(watch: Watch, totals: Totals) -> tuple[Part, ...]:
    """What was counted, by neuron."""
    graph = watch.graph
    assert graph is not None
    return added_up(
        Part(site.index, site.name, site.module, site.kind, index, roots, counts.each(Tensor.flatten))
        for (site, index), counts in totals.items()
        for roots in [graph.root[site.labels.factors[index].atoms].ravel()]
    )
