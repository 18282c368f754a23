"""What operators give without data is the same when it is remembered."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import torchtrim
from torchtrim import _meta
from torchtrim._reach import reach

IMAGES = torch.empty(2, 6, 8, 8, device="meta")
ROWS = torch.empty(4, 6, device="meta")
LAST = IMAGES.to(memory_format=torch.channels_last)

CALLS: dict[str, Callable[[], object]] = {
    "relu6": lambda: F.relu6(IMAGES),
    "gelu of a view": lambda: F.gelu(IMAGES.transpose(1, 3)),
    "channels last": lambda: F.hardswish(LAST),
    "half precision": lambda: F.silu(IMAGES.bfloat16()),
    "compared": lambda: ROWS > 0.5,
    "a number": lambda: ROWS.mean(1, keepdim=True),
    "layer norm": lambda: F.layer_norm(ROWS, [6]),
    "pooled with indices": lambda: F.max_pool2d(IMAGES, 2, return_indices=True),
    "joined": lambda: torch.cat([ROWS, ROWS[:2]]),
    "broadcast": lambda: ROWS + ROWS[:, :1],
    "a convolution": lambda: F.conv2d(LAST, torch.empty(3, 6, 3, 3, device="meta"), padding=1),
    "resized": lambda: F.interpolate(IMAGES, scale_factor=2.0, mode="bilinear"),
    "picked": lambda: ROWS[torch.zeros(3, dtype=torch.long, device="meta")],
    "sorted": lambda: ROWS.topk(3),
}


class Remembering(TorchDispatchMode):
    """Runs every operator as a flow does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        return _meta.computed(name, func, args, kwargs or {}, None)


def looks(result: object) -> list[object]:
    several = result if isinstance(result, (tuple, list)) else (result,)
    return [(one.shape, one.stride(), one.dtype, one.device) for one in several if isinstance(one, Tensor)]


@pytest.mark.parametrize("name", CALLS)
def test_the_second_time_looks_as_the_first(name) -> None:
    expected = looks(CALLS[name]())
    with Remembering():
        assert looks(CALLS[name]()) == expected
        assert looks(CALLS[name]()) == expected


def test_in_place_gives_the_operand_itself() -> None:
    with Remembering():
        for _ in range(2):
            x = torch.empty(4, 6, device="meta")
            assert x.clamp_(0, 6) is x
            assert x.add_(ROWS) is x


def test_operators_that_change_what_a_tensor_looks_like_run() -> None:
    with Remembering():
        for _ in range(2):
            x = torch.empty(4, 1, 6, device="meta")
            assert x.squeeze_(1).shape == (4, 6)
            assert x.t_().shape == (6, 4)


def test_views_share_memory() -> None:
    with Remembering():
        for _ in range(2):
            x = torch.empty(4, 6, device="meta")
            assert x.diagonal().untyped_storage()._cdata == x.untyped_storage()._cdata


def test_what_does_not_fit_raises_each_time() -> None:
    with Remembering():
        for _ in range(2):
            with pytest.raises(RuntimeError):
                ROWS + torch.empty(4, 5, device="meta")


def test_flops_are_counted_all_the_same() -> None:
    model, example = torchvision.models.mobilenet_v3_small().eval(), torch.zeros(1, 3, 64, 64)
    graph = torchtrim.trace(model, example)
    first, second = (reach(model, graph, example).flops for _ in range(2))
    assert first == second
    assert first.all > 0
