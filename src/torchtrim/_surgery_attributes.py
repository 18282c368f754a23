"""The integer attributes with which modules describe their widths.

PyTorch's own are known by their meaning, others by what the trace saw their code do. The proof tells whether an
attribute meant what it seemed to.
"""

from collections.abc import Iterator, Mapping

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from torchtrim._attention import adapt
from torchtrim._copies import modules_of, named_tensors
from torchtrim._labels import Atoms, Ledger, Size, canonical
from torchtrim._neurons import Description, Kept, NeuronGraph
from torchtrim._operators_shapes import is_sizes

# Where a module's weight is kept: as it is, by a parametrization, by `weight_norm` of either kind, or by `prune`.
_WEIGHTS = ("weight", "parametrizations.weight.original", "parametrizations.weight.original1", "weight_v",
            "weight_orig")  # fmt: skip
_WEIGHTED = (nn.Linear, _ConvNd, nn.Bilinear, nn.GroupNorm, nn.PReLU, nn.Embedding)  # that tell the widths of a weight
# What attributes that describe a width are called; others of the same value are left alone, and so are ratios.
_RATIO = "key_value_groups"  # of heads that share keys and values: whole groups go
_WORDS = ("head", "dim", "size", "width", "channel", "chs", "feature", "hidden", "planes", "group", "nf")


def descriptions(model: nn.Module, ledger: Ledger, root: Atoms) -> Iterator[Description]:
    """The attributes of the modules' own that have the value of a size which their code gave to a labelled axis."""
    for size in ledger.sizes:
        module = model.get_submodule(size.where)
        places = list(_places(module, size))
        roots = canonical(size.atoms, root) if places else None
        if roots is not None:
            yield from (Description(size.where, name, index, size.axis, size.size, roots) for name, index in places)


def _places(module: nn.Module, size: Size) -> Iterator[tuple[str, int | None]]:
    """The attributes that may have given a size, with the index in those that are lists."""
    bare = isinstance(module, _NormBase) and not module.affine and not module.track_running_stats
    if bare and module.num_features == size.size:
        yield "num_features", None
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and is_sizes(module.normalized_shape, size.pieces):
        yield "normalized_shape", size.index
        return
    if type(module).__module__.startswith("torch.nn."):
        return
    if size.pieces:
        yield from ((name, size.index) for name, value in vars(module).items() if is_sizes(value, size.pieces))
    equal = [name for name, value in vars(module).items() if type(value) is int and value == size.size]
    equal = [name for name in equal if _RATIO not in name]
    named = [name for name in equal if any(word in name.lower() for word in _WORDS)]
    # a piece is as long as code says; what a view makes of an axis may be what is left over
    yield from ((name, None) for name in named or (equal if size.pieces else ()))


def set_attributes(model: nn.Module, trimmed: nn.Module, graph: NeuronGraph, kept: Kept) -> None:
    """Bring each module's description in line with its tensors after a trim, in place."""
    _set_own(model, trimmed, graph.axes, kept)
    found: dict[tuple[str, str, int | None], set[int]] = {}
    for one in (one for one in graph.descriptions if not one.fixed):
        found.setdefault((one.module, one.attribute, one.index), set()).add(one.left(kept))
    for (name, attribute, index), values in found.items():
        if len(values) == 1:  # else it means more than one thing
            module, value = trimmed.get_submodule(name), values.pop()
            if index is not None:
                old = list(getattr(module, attribute))
                value = type(getattr(module, attribute))([*old[:index], value, *old[index + 1 :]])
            setattr(module, attribute, value)
    adapt(trimmed)


def _set_own(model: nn.Module, trimmed: nn.Module, axes: Mapping[str, tuple[Atoms, ...]], kept: Kept) -> None:
    """Those of PyTorch's own modules."""
    names = {id(tensor): name for name, tensor in named_tensors(model).items()}
    pairs = [*zip(modules_of(model), modules_of(trimmed), strict=True)]
    for old, new in pairs:
        name = _weight_of(old, names) if isinstance(new, _WEIGHTED) else None
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
    for old, new in pairs:
        _set_without_weight(old, new, names, axes, kept)


def _set_without_weight(
    old: nn.Module, new: nn.Module, names: Mapping[int, str], axes: Mapping[str, tuple[Atoms, ...]], kept: Kept
) -> None:
    """Of modules whose widths are those of several tensors, or of a buffer."""
    if isinstance(new, nn.MultiheadAttention):
        _set_heads(old, new, names, axes, kept)
    elif isinstance(new, (nn.RNNBase, nn.RNNCellBase)):
        _set_states(new)
    elif isinstance(new, _NormBase):
        vector = new.weight if new.affine else new.running_mean
        if vector is not None:
            new.num_features = len(vector)


def _set_heads(
    old: nn.Module,
    new: nn.MultiheadAttention,
    names: Mapping[int, str],
    axes: Mapping[str, tuple[Atoms, ...]],
    kept: Kept,
) -> None:
    """Heads go whole; what is left of the features is what the projections say."""
    parameters = dict(old.named_parameters(remove_duplicate=False))
    packed = "in_proj_weight" in parameters
    queries = parameters["in_proj_weight" if packed else "q_proj_weight"]
    new.num_heads = _groups_left(new.num_heads, axes[names[id(queries)]][0][: new.num_heads * new.head_dim], kept)
    left = new.in_proj_weight if packed else new.q_proj_weight
    new.embed_dim = new.kdim = new.vdim = left.shape[1]
    if not packed:
        new.kdim, new.vdim = new.k_proj_weight.shape[1], new.v_proj_weight.shape[1]


def _set_states(new: nn.RNNBase | nn.RNNCellBase) -> None:
    """What is read, and what is remembered: with projections, less than the cells hold."""
    shapes = {name.removesuffix("_l0"): tuple(parameter.shape) for name, parameter in new.named_parameters()}
    new.input_size, new.hidden_size = shapes["weight_ih"][1], shapes["weight_hh"][1]
    if isinstance(new, nn.RNNBase) and "weight_hr" in shapes:
        new.proj_size, new.hidden_size = shapes["weight_hr"]


def _weight_of(module: nn.Module, names: Mapping[int, str]) -> str | None:
    """The name in the model under which a module's weight is known."""
    own = dict(module.named_parameters(remove_duplicate=False))
    return next((names[id(own[key])] for key in _WEIGHTS if key in own), None)


def _groups_left(groups: int, roots: Atoms, kept: Kept) -> int:
    if roots.size <= 1:
        return groups
    return int(kept[roots].reshape(groups, -1).any(axis=1).sum())
