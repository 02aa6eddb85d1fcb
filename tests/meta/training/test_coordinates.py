"""Coordinates: an exact inverse, and a chain rule that agrees with differences."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperdescent.inner.core.hyper import decay, fraction, learning_rate
from hyperdescent.meta.training.coordinates import Coordinates

HYPERS = {
    "lr": learning_rate(1e-3),
    "beta1": decay(0.9),
    "warmup": fraction(0.1),
    "lr.knots": learning_rate(1e-2).shaped(3),
    "beta2.knots": decay(0.99).shaped(2, 2),
}
COORDINATES = Coordinates(HYPERS)
SIZE = 10


def anywhere():
    """Coordinates inside the box, by the share of the way from its low to its high end."""
    shares = st.lists(st.floats(0, 1), min_size=SIZE, max_size=SIZE)
    return shares.map(lambda share: low() + torch.tensor(share) * (high() - low()))


def low():
    return COORDINATES.inside(torch.full((SIZE,), -1e9, dtype=torch.float64))


def high():
    return COORDINATES.inside(torch.full((SIZE,), 1e9, dtype=torch.float64))


def middle():
    return (low() + high()) / 2 + 0.1


@given(anywhere())
def test_free_is_the_inverse_of_point(z):
    point = COORDINATES.point(z)
    assert {name: value.shape for name, value in point.items()} == {
        name: torch.Size(hyper.shape) for name, hyper in HYPERS.items()
    }
    # 1 - 0.99999 has 11 digits left of float64's 16, and log and exp each cost one more.
    torch.testing.assert_close(COORDINATES.free(point), z, rtol=1e-9, atol=1e-9)


@given(anywhere())
def test_every_point_inside_is_legal_and_in_its_search_range(z):
    for name, value in COORDINATES.point(z).items():
        HYPERS[name].check(name, value)
        edge_low, edge_high = HYPERS[name].search
        # The box's edges have been float32.
        assert (value >= edge_low * (1 - 1e-5)).all() and (value <= edge_high * (1 + 1e-5)).all()


def test_the_box_is_the_search_range():
    for name, value in COORDINATES.point(low()).items():
        assert value.flatten()[0].item() == pytest.approx(HYPERS[name].search[0])
    for name, value in COORDINATES.point(high()).items():
        assert value.flatten()[0].item() == pytest.approx(HYPERS[name].search[1])


def test_inside_leaves_what_is_inside():
    torch.testing.assert_close(COORDINATES.inside(middle()), middle(), rtol=0, atol=0)


def test_float32_values_become_float64_coordinates():
    point = {name: value.float() for name, value in COORDINATES.point(middle()).items()}
    assert COORDINATES.free(point).dtype == torch.float64


def loss(point):
    """Curved in every value and mixing them."""
    flat = torch.cat([value.flatten() for value in point.values()])
    return (flat * torch.arange(1.0, SIZE + 1)).sum().sin() + (flat**2).sum()


def test_pull_is_the_gradient_of_the_composed_map():
    leaves = {name: v.requires_grad_() for name, v in COORDINATES.point(middle()).items()}
    grads = dict(zip(leaves, torch.autograd.grad(loss(leaves), leaves.values()), strict=True))
    pulled = COORDINATES.pull(middle(), grads)
    h = 1e-5
    nudges = torch.eye(SIZE, dtype=torch.float64) * h
    differences = [
        (loss(COORDINATES.point(middle() + d)) - loss(COORDINATES.point(middle() - d))) / (2 * h)
        for d in nudges
    ]
    # Central differences: h**2 and rounding / h are both about 1e-10.
    torch.testing.assert_close(pulled, torch.stack(differences), rtol=1e-7, atol=1e-8)


def test_a_gradient_in_a_logarithm_is_the_value_times_the_gradient():
    coordinates = Coordinates({"lr": learning_rate(1e-3)})
    z = torch.tensor([0.02], dtype=torch.float64).log()
    pulled = coordinates.pull(z, {"lr": torch.tensor(3.0)})
    assert pulled.item() == pytest.approx(3 * 0.02, rel=1e-12)


def test_a_gradient_in_a_logit_is_the_share_times_its_rest_times_the_gradient():
    coordinates = Coordinates({"beta1": decay(0.9)})
    z = torch.tensor([0.9], dtype=torch.float64).logit()
    pulled = coordinates.pull(z, {"beta1": torch.tensor(3.0, dtype=torch.float64)})
    assert pulled.item() == pytest.approx(3 * 0.9 * 0.1, rel=1e-12)


def test_float32_hypers_stay_float32_all_the_way():
    wide = replace(learning_rate(1e-2).shaped(3), dtype=torch.float32)
    space = Coordinates({"wide": wide})
    z = space.inside(space.free({"wide": torch.full((3,), 2.0)}))
    point = space.point(z)
    pulled = space.pull(z, {"wide": torch.ones(3)})
    assert z.dtype == point["wide"].dtype == pulled.dtype == torch.float32
    torch.testing.assert_close(point["wide"], torch.ones(3))  # The range ends there.
    torch.testing.assert_close(pulled, point["wide"])


def test_beside_float64_hypers_the_vector_is_float64_and_values_keep_their_dtype():
    wide = replace(learning_rate(1e-2).shaped(2), dtype=torch.float32)
    space = Coordinates({"lr": learning_rate(1e-3), "wide": wide})
    z = space.free({"lr": torch.tensor(0.5), "wide": torch.full((2,), 0.5)})
    point = space.point(z)
    assert z.dtype == point["lr"].dtype == torch.float64
    assert point["wide"].dtype == torch.float32
    assert space.pull(z, {"lr": torch.tensor(1.0), "wide": torch.ones(2)}).dtype == torch.float64
