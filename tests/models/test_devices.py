"""Devices by name."""

import pytest
import torch

from convert.core.errors import UserError
from convert.models.devices import check_device
from convert.models.loading import load_teacher


def test_check_device():
    assert check_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match=r"must be one that this machine has \(cpu.*got 'gpu'"):
        check_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"\(cpu\); got 'cuda'"):
            load_teacher("neox-nano", device="cuda")
