"""The integer attributes with which PyTorch's own modules describe their widths."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from torchtrim._flow import named_tensors
from torchtrim._labels import Atoms

# Where a module's weight is kept: as it is, by a parametrization, or by `weight_norm` of either kind.
_WEIGHTS = ("weight", "parametrizations.weight.original", "parametrizations.weight.original1", "weight_v")


def set_attributes(
    model: nn.Module, trimmed: nn.Module, axes: Mapping[str, tuple[Atoms, ...]], kept: NDArray[np.bool_]
) -> None:
    """Bring each module's description in line with its tensors after a trim, in place."""
    names = {id(tensor): name for name, tensor in named_tensors(model).items()}
    for old, new in zip(model.modules(), trimmed.modules(), strict=True):
        name = _weight_of(old, names)
        if name is None:
            continue
        shape, rows = trimmed.get_parameter(name).shape, axes[name][0]
        if isinstance(new, nn.Linear):
            new.out_features, new.in_features = shape
        elif isinstance(new, _ConvNd):
            new.groups = _groups_left(new.groups, rows, kept)
            first, second = shape[0], shape[1] * new.groups
            transposed = isinstance(new, _ConvTransposeNd)
            new.in_channels, new.out_channels = (first, second) if transposed else (second, first)
        elif isinstance(new, nn.Bilinear):
            new.out_features, new.in1_features, new.in2_features = shape
        elif isinstance(new, nn.GroupNorm):
            new.num_groups = _groups_left(new.num_groups, rows, kept)
            new.num_channels = shape[0]
        elif isinstance(new, nn.PReLU):
            new.num_parameters = shape[0]
        elif isinstance(new, nn.Embedding):
            new.num_embeddings, new.embedding_dim = shape
    for norm in (module for module in trimmed.modules() if isinstance(module, _NormBase)):
        vector = norm.weight if norm.affine else norm.running_mean
        if vector is not None:
            norm.num_features = len(vector)


def _weight_of(module: nn.Module, names: Mapping[int, str]) -> str | None:
    """The name in the model under which a module's weight is known."""
    own = dict(module.named_parameters(remove_duplicate=False))
    return next((names[id(own[key])] for key in _WEIGHTS if key in own), None)


def _groups_left(groups: int, roots: Atoms, kept: NDArray[np.bool_]) -> int:
    if roots.size <= 1:
        return groups
    return int(kept[roots].reshape(groups, -1).any(axis=1).sum())
