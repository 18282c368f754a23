"""What functions of the caller's may return as an accuracy, and what not."""

import numpy as np
import pytest
import torch
from torch import nn

from torchtrim._accuracy import accuracy_of
from torchtrim.errors import ProfileError

MODEL = nn.Linear(1, 1)


@pytest.mark.parametrize("value", [90, 90.0, np.float32(90), torch.tensor(90.0), torch.tensor([90])])
def test_one_number_of_any_kind(value) -> None:
    found = accuracy_of(lambda model: value, MODEL, "the model")
    assert type(found) is float
    assert found == 90


@pytest.mark.parametrize("value", [None, "90", (90.0, 0.1), torch.zeros(2), {"accuracy": 90.0}])
def test_all_else_is_refused(value) -> None:
    with pytest.raises(ProfileError, match="evaluate: expected one number, the accuracy of the model, found "):
        accuracy_of(lambda model: value, MODEL, "the model")
