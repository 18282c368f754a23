"""Teach the trace an operator of your own: what it does to the neurons of the tensors that it is given.

An operator that torchtrim does not know keeps every neuron whose values reach it. If it computes each element of its
result from the elements at the same position, say so:

    torchtrim.register_operator("mylib::scaled_gelu", "pointwise")

Else write a row: a function of a `Call` that returns the `Labels` of the result, one for each tensor where there are
several. `call.labels_of(tensor)` are those of an operand; a `Factor` of them is an integer array that broadcasts
against the tensor and says for each of its elements to which neuron it belongs. An operator that reverses the channels
of [batch, channels, length]:

    def reversed_channels(call: Call) -> Labels:
        labels = call.labels_of(call.args[0])
        return labels.with_factors(factor.map(np.flip(factor.atoms, 1)) for factor in labels.factors)

`call.fix` keeps an axis at its size, `call.ledger.unite` makes two neurons one, `call.ledger.pin` keeps some.
`torchtrim.testing.assert_exact` tells whether a row is right.
"""

import re
from typing import Literal

from torchtrim._flow import TABLE
from torchtrim._labels import Factor, Labels
from torchtrim._operators import Call, Row, pointwise
from torchtrim.errors import TorchtrimError

__all__ = ["Call", "Factor", "Labels", "Row", "pointwise", "register_operator"]


def register_operator(name: str, row: Row | Literal["pointwise"]) -> None:
    """Say what an operator does to neurons, in this process.

    name: as in `torch.library`, "namespace::name" without the overload; of PyTorch's own the namespace is "aten".
    row: a function of a `Call`, or "pointwise" where each element of the result depends on those at its position alone.
    In-place variants (`name_`) have the same row.

    Raises TorchtrimError: not such a name, or an operator that has a row already.
    """
    if not re.fullmatch(r"\w+::\w+", name):
        raise TorchtrimError(f'register_operator: expected a name such as "mylib::scaled_gelu", found {name!r}')
    if row != "pointwise" and not callable(row):
        raise TorchtrimError(f'register_operator: expected a function of a Call or "pointwise", found {row!r}')
    key = name.removeprefix("aten::").rstrip("_")
    if key in TABLE:
        raise TorchtrimError(f"register_operator: {name} has a row already; expected an operator without one")
    TABLE[key] = pointwise if row == "pointwise" else row
