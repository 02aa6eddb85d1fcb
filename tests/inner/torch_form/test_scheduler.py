"""The values a HyperScheduler sets, on learned results too in other tests; what it refuses."""

import pytest
import torch

from hyperdescent.inner.core.hyper import decay, learning_rate
from hyperdescent.inner.schedules.schedule import SCHEDULES, find_schedule
from hyperdescent.inner.torch_form import optimizer as optim
from hyperdescent.inner.torch_form.scheduler import HyperScheduler


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


@pytest.mark.parametrize("spec", SCHEDULES)
def test_it_sets_the_values_of_every_schedule(spec):
    schedule, steps = find_schedule(spec), 12
    tables = {}
    for name, hyper in {"lr": learning_rate(0.2), "momentum": decay(0.9)}.items():
        knobs = {
            n: torch.full(knob.shape, knob.default, dtype=torch.float64)
            for n, knob in schedule.knobs(hyper, steps).items()
        }
        tables[name] = schedule.table(steps, knobs, hyper).tolist()
    sgd = optimizer(2)
    scheduler = HyperScheduler(sgd, tables)
    for i in [*range(steps), steps - 1]:
        for group in sgd.param_groups:
            assert (group["lr"], group["momentum"]) == (tables["lr"][i], tables["momentum"][i])
        sgd.step()
        scheduler.step()


def test_betas_of_any_number_are_set_in_their_tuple():
    adan = optim.Adan([torch.nn.Parameter(torch.zeros(1))], betas=(0.98, 0.92, 0.99))
    scheduler = HyperScheduler(adan, {"beta3": [0.9, 0.5], "beta1": [0.8, 0.7]})
    assert adan.param_groups[0]["betas"] == (0.8, 0.92, 0.9)
    adan.step()
    scheduler.step()
    assert adan.param_groups[0]["betas"] == (0.7, 0.92, 0.5)
