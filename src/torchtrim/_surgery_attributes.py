"""The integer attributes with which PyTorch's own modules describe their widths."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from torchtrim._labels import Atoms


def set_attributes(
    model: nn.Module, trimmed: nn.Module, axes: Mapping[str, tuple[Atoms, ...]], kept: NDArray[np.bool_]
) -> None:
    """Bring each module's description in line with its tensors after a trim, in place."""
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    for (_, old), (_, new) in zip(model.named_modules(), trimmed.named_modules(), strict=True):
        if isinstance(new, nn.Linear):
            new.out_features, new.in_features = new.weight.shape
        elif isinstance(new, _ConvNd) and isinstance(old, _ConvNd):
            roots = axes[names[id(old.weight)]][0]
            new.groups = _groups_left(old.groups, roots, kept)
            first, second = new.weight.shape[0], new.weight.shape[1] * new.groups
            transposed = isinstance(new, _ConvTransposeNd)
            new.in_channels, new.out_channels = (first, second) if transposed else (second, first)
        elif isinstance(new, _NormBase):
            vector = new.weight if new.affine else new.running_mean
            if vector is not None:
                new.num_features = len(vector)
        elif isinstance(new, nn.GroupNorm) and isinstance(old, nn.GroupNorm) and old.affine:
            new.num_groups = _groups_left(old.num_groups, axes[names[id(old.weight)]][0], kept)
            new.num_channels = len(new.weight)
        elif isinstance(new, nn.PReLU):
            new.num_parameters = new.weight.numel()
        elif isinstance(new, nn.Embedding):
            new.num_embeddings, new.embedding_dim = new.weight.shape


def _groups_left(groups: int, roots: Atoms, kept: NDArray[np.bool_]) -> int:
    if roots.size <= 1:
        return groups
    return int(kept[roots].reshape(groups, -1).any(axis=1).sum())
