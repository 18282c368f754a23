"""Several processes measure their shards, and each gets the profile of all of them."""

import os
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torchtrim import Profile, TorchtrimError, TorchtrimWarning, profile

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs the gloo backend")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(64, 6), nn.ReLU(),
        nn.Linear(6, 2),
    )  # fmt: skip


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(count, 1, 8, 8, generator=generator) for count in (4, 4, 4, 4, 3)]


def shard(rank: int, world: int) -> list[Tensor]:
    """Uneven: of three processes, the last has one batch; none begins with the same."""
    return batches()[rank::world] if world < 3 else [batches()[:2], batches()[2:4], batches()[4:]][rank]


# What each process does, as functions that are told its number and how many there are -----------------------


def plain(rank: int, world: int) -> Profile:
    return profile(network(), shard(rank, world))


def tolerant(rank: int, world: int) -> Profile:
    return profile(network(), shard(rank, world), zero_tolerance=0.2)


def one_has_nothing(rank: int, world: int) -> Profile:
    return profile(network(), [] if rank == 0 < world - 1 else batches()[max(rank - 1, 0) :: max(world - 1, 1)])


def wrapped(rank: int, world: int) -> Profile:
    model = network()
    return profile(DistributedDataParallel(model) if world > 1 else model, shard(rank, world))


def alone(rank: int, world: int) -> Profile:
    return profile(network(), batches(), sharded=False)


def resumed(rank: int, world: int) -> Profile:
    """The first process fails after a batch; then all go on from what they kept."""

    def loader() -> Iterator[Tensor]:
        yield shard(rank, world)[0]
        if rank == 0:
            raise OSError("the disk is gone")
        yield from shard(rank, world)[1:]

    with pytest.raises((TorchtrimError, OSError)):
        profile(network(), loader(), checkpoint="pass", every=1, zero_tolerance=0.2)
    for data in (shard(rank, world), ()):
        found = profile(network(), data, checkpoint="pass", every=1, zero_tolerance=0.2)
    return found


def by_class(rank: int, world: int) -> Profile:
    """Not every process has examples of every class."""
    data = [(images, [len(images)] * len(images)) for images in shard(rank, world)]
    return profile(network(), data, classes=True)


def alike(rank: int, world: int) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        profile(network(), batches())
    return "\n".join(str(one.message) for one in caught if issubclass(one.category, TorchtrimWarning))


def error_of(work: Callable[[], Any]) -> str:
    with pytest.raises(TorchtrimError) as caught:
        work()
    return f"{type(caught.value).__mro__[1].__name__}: {caught.value}"


def no_data(rank: int, world: int) -> str:
    return error_of(lambda: profile(network(), []))


def fails(rank: int, world: int) -> str:
    def loader() -> Iterator[Tensor]:
        yield batches()[0]
        if rank == world - 1:
            raise OSError("the disk is gone")

    return error_of(lambda: profile(network(), loader()))


def fails_at_once(rank: int, world: int) -> str:
    def loader() -> Iterator[Tensor]:
        if rank == world - 1:
            raise OSError("the disk is gone")
        yield batches()[0]

    return error_of(lambda: profile(network(), loader(), zero_tolerance=0.1))


def interrupted(rank: int, world: int) -> str:
    def loader() -> Iterator[Tensor]:
        yield batches()[0]
        if rank == world - 1:
            raise KeyboardInterrupt

    return error_of(lambda: profile(network(), loader()))


def another_model(rank: int, world: int) -> str:
    model = network()
    if rank:
        nn.init.ones_(model[0].weight)  # type: ignore[arg-type]
    return error_of(lambda: profile(model, shard(rank, world)))


WHOLE = (plain, tolerant, one_has_nothing, wrapped, alone, resumed, by_class)
SEVERAL = (alike, no_data, fails, fails_at_once, interrupted, another_model)


def work(rank: int, world: int, place: Path) -> None:
    torch.set_num_threads(1)
    os.chdir(place)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{place}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=100)
    )
    found: dict[str, str] = {}
    for case in WHOLE + (SEVERAL if world > 1 else ()):
        result = case(rank, world)
        if isinstance(result, Profile):
            result.save(place / f"{case.__name__}-{rank}")
        else:
            found[case.__name__] = result
    torch.save(found, place / f"told-{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[1, 2, 3])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """How many processes there were, and what they left."""
    world, place = request.param, tmp_path_factory.mktemp("processes")
    mp.spawn(work, (world, place), nprocs=world)
    return world, place


def told(done: tuple[int, Path], case: Callable[..., Any]) -> str:
    """What every process was told; they must have been told the same."""
    world, place = done
    if world == 1:
        pytest.skip("of several processes")
    said = [torch.load(place / f"told-{rank}")[case.__name__] for rank in range(world)]
    assert len(set(said)) == 1
    return said[0]


@pytest.mark.parametrize("case", WHOLE)
def test_the_whole_is_that_of_a_single_process(done: tuple[int, Path], case: Callable[..., Any]) -> None:
    world, place = done
    expected = profile(network(), batches(), zero_tolerance=0.2 if case in (tolerant, resumed) else 0.0)
    assert expected.zeros["0"].any()
    found = [Profile.load(place / f"{case.__name__}-{rank}") for rank in range(world)]
    for one in found:
        assert one.examples == 19
        assert not one.partial
        for name, layer in expected.items():
            for integers in ("zeros", "positions", "examples"):
                np.testing.assert_array_equal(getattr(one[name], integers), getattr(layer, integers))
            for floats in ("mean", "mean_square", "standard_error", "incoming_l1"):
                np.testing.assert_allclose(getattr(one[name], floats), getattr(layer, floats), rtol=1e-9)
    assert len({(place / f"{case.__name__}-{rank}").read_bytes() for rank in range(world)}) == 1
    if case is by_class:
        assert {label: one.examples for label, one in found[0].classes.items()} == {3: 3, 4: 16}
    if case is resumed:
        assert Profile.load(place / "pass").examples == 19
    if case in (tolerant, resumed):
        assert found[0].zeros["2"].any()


def test_all_processes_are_told_what_one_met(done: tuple[int, Path]) -> None:
    world, _ = done
    last = f"ProfileError: process {world - 1} of {world}: "
    assert told(done, fails) == last + "OSError: the disk is gone"
    assert told(done, fails_at_once) == last + "OSError: the disk is gone"
    assert told(done, interrupted) == last + "interrupted"


def test_shards_must_be_of_one_model_and_some_data(done: tuple[int, Path]) -> None:
    world, _ = done
    assert "expected at least one batch, found none" in told(done, no_data)
    assert "process 1: expected the model of process 0, measured in one way, found other weights in '0'" in told(
        done, another_model
    )
    assert f"all {world} processes measured the same data" in told(done, alike)
