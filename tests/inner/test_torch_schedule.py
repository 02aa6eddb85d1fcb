"""What a HyperScheduler refuses; that it sets the values is tested on learned results."""

import pytest
import torch

from hyperdescent.inner.torch_schedule import HyperScheduler


def optimizer(groups=1):
    weights = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(groups)]
    return torch.optim.SGD(weights, lr=0.1)


@pytest.mark.parametrize(("table", "groups"), [([], 1), ([[], [0.1]], 2)])
def test_an_empty_table(table, groups):
    with pytest.raises(ValueError, match=r"table of lr is empty; give its value at every step"):
        HyperScheduler(optimizer(groups), {"lr": table})


def test_more_groups_than_tables():
    with pytest.raises(ValueError, match="lr has 2 schedules for 3 parameter groups; give one"):
        HyperScheduler(optimizer(3), {"lr": [[0.1], [0.2]]})


def test_a_group_that_is_added_later():
    sgd = optimizer()
    scheduler = HyperScheduler(sgd, {"lr": [0.1, 0.2]})
    sgd.step()
    sgd.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    with pytest.raises(ValueError, match="lr has 1 schedules for 2 parameter groups; give one"):
        scheduler.step()
