"""Run models over calibration data, and listen to what their layers are given and compute."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torchtrim._attention import MultiheadAttention
from torchtrim._forward import Forward, device_of, left_as_found, moved, usual_call
from torchtrim.errors import ProfileError, TorchtrimError

Listener: TypeAlias = Callable[[Tensor, Tensor], Any]  # hears what a module is given, and what it computes


class Calibration:
    """Data that are read several times. batches, forward: as for `profile`.

    Raises ProfileError: data that can be read once only, or none; each `run` one that names the batch.
    """

    def __init__(self, batches: Iterable[Any], forward: Forward | None = None) -> None:
        if isinstance(batches, (Tensor, Iterator)):
            raise ProfileError(
                f"batches: expected data that can be read several times, such as a list or a DataLoader, found a "
                f"{type(batches).__name__}"
            )
        self._batches = batches
        self._call = forward or usual_call
        self._number = 0
        self._calls: dict[nn.Module, int] = {}

    def __iter__(self) -> Iterator[Any]:
        self._number = 0
        self._calls.clear()
        for self._number, batch in enumerate(self._batches, 1):  # noqa: B020
            yield batch
        if not self._number:
            raise ProfileError("expected at least one batch, found none; look at what the loader yields")

    def run(self, model: nn.Module, batch: Any, listeners: Mapping[nn.Module, Listener]) -> None:
        """Call a model, without gradients; each listener hears every call of its module.

        What follows the last of these calls is left out, if the first batch of the pass called all of the modules: a
        call ends once as many calls were heard.
        """
        heard: list[nn.Module] = []
        enough = self._calls.get(model, 0)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Tensor) -> None:
            read = args[0] if args else kwargs["input"]
            listeners[module](read.detach(), outputs.detach())  # a model may ask for gradients by itself
            heard.append(module)
            if len(heard) == enough:
                raise _Enough

        with suppress(_Enough):
            self._called(model, batch, dict.fromkeys(listeners, hook))
        self._calls.setdefault(model, len(heard) if set(heard) == set(listeners) else 0)

    def outputs(self, model: nn.Module, batch: Any, replaced: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Any:
        """What a call of the model returns, without gradients, where some of its modules compute something else."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Tensor) -> Tensor:
            return replaced[module](args[0] if args else kwargs["input"])

        return self._called(model, batch, dict.fromkeys(replaced, hook))

    def _called(self, model: nn.Module, batch: Any, hooks: Mapping[nn.Module, Callable[..., Any]]) -> Any:
        inputs = moved(batch, device_of(model))
        with ExitStack() as handles:
            for module, hook in hooks.items():
                # ahead of hooks of the model's own, which may change what the module computes
                handles.enter_context(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
            try:
                with torch.no_grad():
                    return self._call(model, inputs)
            except TorchtrimError:
                raise
            except Exception as error:
                first = str(error).partition("\n")[0]
                raise ProfileError(
                    f"{type(model).__name__} cannot run on batch {self._number}: {type(error).__name__}: {first}; to "
                    "call it otherwise, pass forward=lambda model, batch: ..."
                ) from error


class _Enough(BaseException):
    """All that is wanted was heard. Not an Exception, so that nothing on the way takes it for one of its own."""


@contextmanager
def as_found(*models: nn.Module) -> Generator[None]:
    """Evaluation mode inside, in which all layers of attention run as modules; at the end all is as it was."""
    attention = [module for model in models for module in model.modules() if type(module) is nn.MultiheadAttention]
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(left_as_found(model, device_of(model)))
        for module in attention:
            stack.callback(setattr, module, "__class__", nn.MultiheadAttention)
            module.__class__ = MultiheadAttention
        yield
