"""Models without the averages of their norms: what a model that was trimmed through norms can be compared in."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class WithoutNorms(TorchDispatchMode):
    """Inside, norms that average over neurons only scale and shift, and averages are sums divided by a constant.

    A model that was trimmed through its norms averages over fewer neurons than the masked one; what it computes
    besides can be compared in here.
    """

    _COUNT = 1024.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in ("native_layer_norm", "_fused_rms_norm"):
            inputs, vectors = args[0], args[2:4] if name == "native_layer_norm" else args[2:3]
            return self._scaled(inputs, vectors), *(torch.zeros_like(inputs[..., 0]) for _ in vectors)
        if name == "native_group_norm" and args[6] == 1:
            vectors = [one if one is None else one.reshape(-1, *[1] * (args[0].ndim - 2)) for one in args[1:3]]
            return self._scaled(args[0], vectors), *(torch.zeros_like(args[0][:, :1]) for _ in vectors)
        if name in ("mean", "var", "std") and isinstance(args[0], Tensor):
            dims = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else None
            kept = (kwargs or {}).get("keepdim", args[2] if name == "mean" and len(args) > 2 else False)
            values = args[0] if name == "mean" else args[0].square()
            # in double precision, or a sum of fewer would be rounded otherwise where norms compute in single
            total = (values.sum(dims, keepdim=kept, dtype=torch.float64) / self._COUNT).to(values.dtype)
            return total.sqrt() if name == "std" else total
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _scaled(inputs: Tensor, vectors: Sequence[Tensor | None]) -> Tensor:
        weight, bias = (*vectors, None)[:2]
        scaled = inputs.clone() if weight is None else inputs * weight
        return scaled if bias is None else scaled + bias
