"""What a model costs once only some of its neurons are left, without trimming it.

Parameters and bytes follow from the axes of the tensors. FLOPs follow from the operators that multiply: each is noted
with the labels of its operands, of which a trim leaves rectangles, and PyTorch's own formula counts what is left.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from torchtrim._copies import named_tensors
from torchtrim._labels import Atoms, Ledger
from torchtrim._marks import labels_of
from torchtrim._neurons import Kept, NeuronGraph
from torchtrim._proof import numbered, on_device
from torchtrim._run import run


class Prices:
    """What is left of a model's parameters, bytes and FLOPs, as `measure` would count them.

    flops: whether to note the operators too, which takes a run of the model without data, where that works.
    """

    def __init__(self, model: nn.Module, graph: NeuronGraph, *, flops: bool = True) -> None:
        self._tensors = [
            (Shape.of_axes(tensor, graph.axes[name]), tensor.element_size(), isinstance(tensor, nn.Parameter))
            for name, tensor in named_tensors(model).items()
        ]
        self._products = _products(model, graph) if flops else []

    def parameters(self, kept: Kept) -> int:
        return sum(prod(shape.left(kept)) for shape, _, parameter in self._tensors if parameter)

    def bytes(self, kept: Kept) -> int:
        return sum(prod(shape.left(kept)) * size for shape, size, _ in self._tensors)

    def flops(self, kept: Kept) -> int:
        return sum(product.flops(kept) for product in self._products)


class Shape:
    """A tensor's shape and, for axes along which neurons lie, their roots: [positions, any number at a position]."""

    def __init__(self, shape: Sequence[int], labelled: Sequence[tuple[int, Atoms]]) -> None:
        self.whole, self._labelled = tuple(shape), labelled

    @classmethod
    def of_axes(cls, tensor: Tensor, axes: Sequence[Atoms]) -> "Shape":
        return cls(tensor.shape, [(axis, roots[:, None]) for axis, roots in enumerate(axes) if roots.size > 1])

    @classmethod
    def of_labels(cls, tensor: Tensor, root: Atoms) -> "Shape":
        labelled: list[tuple[int, Atoms]] = []
        for factor in labels_of(tensor).factors:
            roots = root[factor.atoms]
            labelled += [(axis, np.moveaxis(roots, axis, 0).reshape(roots.shape[axis], -1)) for axis in factor.axes()]
        return cls(tensor.shape, labelled)

    def left(self, kept: Kept) -> list[int]:
        """The shape of what is kept."""
        shape, masks = list(self.whole), dict[int, Any]()
        for axis, roots in self._labelled:
            masks[axis] = kept[roots].any(1) & masks.get(axis, True)
            shape[axis] = int(masks[axis].sum())
        return shape


class _Product:
    """One call of an operator that multiplies: what its formula is given, with shapes in the place of tensors."""

    def __init__(self, function: Any, args: Any, kwargs: Any, result: Any, root: Atoms) -> None:
        self._formula = flop_registry[function]
        given, self._form = pytree.tree_flatten((args, kwargs))
        self._given = [Shape.of_labels(one, root) if isinstance(one, Tensor) else one for one in given]
        self._result = pytree.tree_map_only(Tensor, lambda one: one.shape, result)  # formulas read positions of it

    def flops(self, kept: Kept) -> int:
        given = [one.left(kept) if isinstance(one, Shape) else one for one in self._given]
        args, kwargs = pytree.tree_unflatten(given, self._form)
        return int(self._formula(*args, **kwargs, out_val=self._result))


class _Noting(TorchDispatchMode):
    """Notes the products; it stands outside of the flow that carries the labels, and so sees what that lets through."""

    def __init__(self, root: Atoms) -> None:
        super().__init__()
        self.products: list[_Product] = []
        self._root = root

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.products.append(_Product(func._overloadpacket, args, kwargs, result, self._root))
        return result


def _products(model: nn.Module, graph: NeuronGraph) -> list[_Product]:
    moved = on_device(model, graph.device)
    ledger = Ledger(graph.root, through_norms=graph.through_norms)
    with _Noting(graph.root) as noted:
        run(moved, graph.example, numbered(moved, graph.atoms), ledger, training=False, device=graph.device)
    return noted.products
