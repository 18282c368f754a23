"""Whether a model's own code can know its widths, so that it may do something else once they are others.

Code learns of a width from the shape of a tensor or from an attribute of a PyTorch module, and holds one as a number
that it gives to a function. Where it does neither, it does the same at any width, and a trial cut teaches nothing.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from functools import cache
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchtrim._marks import labels_of
from torchtrim._operators import tensors

# Functions that give code nothing but tensors, and in whose arguments no number is a width: axes, kernels, rates.
_FREE_OF_WIDTHS = frozenset(["conv1d", "conv2d", "conv3d", "linear", "batch_norm", "layer_norm", "dropout",
                             "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
                             "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
                             "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "interpolate",
                             "relu", "relu6", "leaky_relu", "prelu", "elu", "selu", "celu", "gelu", "silu",
                             "mish", "sigmoid", "hardsigmoid", "hardswish", "hardtanh", "tanh", "softplus", "add",
                             "iadd", "radd", "sub", "isub", "mul", "imul", "rmul", "div", "truediv", "neg", "exp",
                             "sqrt", "rsqrt", "pow", "clamp", "addcmul", "mean", "sum", "cat", "concat", "flatten",
                             "permute", "transpose", "contiguous", "dim", "assert"])  # fmt: skip
_CONVOLUTIONS = frozenset(["conv1d", "conv2d", "conv3d"])
_ATTRIBUTES = frozenset(["ndim", "dtype", "device", "is_meta", "requires_grad", "training"])  # of tensors
# What PyTorch's modules call their widths.
_WIDTHS = frozenset(["in_features", "out_features", "in1_features", "in2_features", "in_channels", "out_channels",
                     "groups", "num_features", "num_channels", "num_groups", "num_parameters", "num_embeddings",
                     "embedding_dim", "normalized_shape", "num_heads", "head_dim", "embed_dim", "kdim", "vdim",
                     "input_size", "hidden_size", "proj_size"])  # fmt: skip


_KNOWN = (nn.Module, type, BuiltinFunctionType)  # what may be called, and is not a model's own code


def tells_widths(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether code may learn of a width by calling a function, or hold one that it gives to it."""
    if _is_free(function):
        return function.__name__ in _CONVOLUTIONS and _has_wide_groups(*args, **kwargs)
    given = tensors(pytree.tree_leaves((args, kwargs)))
    return not given or any(labels_of(one).factors for one in given)


def _has_wide_groups(_: Tensor, weight: Tensor, *args: Any, groups: int = 1, **kwargs: Any) -> bool:
    """Of a convolution: whether its groups have more than one channel. How those are cut depends on their number."""
    groups = args[4] if len(args) > 4 else groups
    return groups > 1 and tuple(weight.shape[:2]) != (groups, 1)


@cache
def _is_free(function: Any) -> bool:
    name = getattr(function, "__name__", "")
    if name == "__get__":
        return function.__self__.__name__ in _ATTRIBUTES
    return name.strip("_") in _FREE_OF_WIDTHS


def may_read_widths(modules: Sequence[nn.Module], attributes: Set[str]) -> bool:
    """Whether code of these modules that runs may look at an attribute that is a width.

    attributes: those of the modules' own; PyTorch's are known.
    """
    kinds = {type(one) for one in modules}
    found: set[str] = set()
    waiting = {"forward", "__call__", "__getattr__"}
    for module in modules:
        held = [value for value in vars(module).values() if callable(value) and not isinstance(value, _KNOWN)]
        if module._forward_hooks or module._forward_pre_hooks or not all(type(one) is FunctionType for one in held):
            return True  # what runs is not to be seen
        waiting = waiting.union(*(_names(one, set()) for one in held))
    while waiting:
        found |= waiting
        waiting = set().union(*(_methods(kind).get(name, ()) for kind in kinds for name in waiting)) - found
    return not found.isdisjoint(_WIDTHS | attributes)


@cache
def _methods(kind: type[nn.Module]) -> Mapping[str, Set[str]]:
    """The names that occur in each method of a class that is not PyTorch's own."""
    own = [parent for parent in kind.__mro__ if not _is_of_torch(parent.__module__)]
    methods: dict[str, Set[str]] = {}
    for name, value in (item for parent in reversed(own) for item in vars(parent).items()):
        function = getattr(value, "fget", None) or getattr(value, "__func__", value)
        if isinstance(function, FunctionType):
            methods[name] = methods.get(name, frozenset()) | _names(function, set())
    return methods


def _is_of_torch(module: str) -> bool:
    return module == "builtins" or module.startswith("torch.nn.modules.")


def _names(function: FunctionType, seen: set[FunctionType]) -> set[str]:
    """All names in a function, and in the functions that it may call: in its module, in others, in containers."""
    seen.add(function)
    found = {name for code in _codes(function.__code__) for name in code.co_names}
    named = [function.__globals__.get(name) for name in found]
    others = [vars(one) for one in named if isinstance(one, ModuleType) and not _is_torch(one.__name__)]
    named += [module.get(name) for module in others for name in found]
    named += [cell.cell_contents for cell in function.__closure__ or ()] + [getattr(function, "__wrapped__", None)]
    for one in named:
        held = one.values() if isinstance(one, dict) else one if isinstance(one, (list, tuple)) else [one]
        for other in held:
            if isinstance(other, FunctionType) and other not in seen and not _is_torch(str(other.__module__)):
                found |= _names(other, seen)
    return found


def _is_torch(module: str) -> bool:
    return module.partition(".")[0] == "torch"


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function, and of those inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
