"""Pictures are drawn, and show something."""

import math

import pytest
import torch
from matplotlib import image

from hyperdescent.search.plot import Drawing, compare, drawing_of
from hyperdescent.search.tune import tune


@pytest.fixture
def tuned(make_problem, ticking):
    def make(rule="adamw", *, loss_fn=None, **more):
        problem = make_problem(loss_fn) if loss_fn else make_problem()
        return tune(problem, rule, **{"steps": 4, "budget": "0.3s", "progress": False, **more})

    return make


def drawn(path):
    """The pixels, which must be neither nothing nor of one colour."""
    pixels = image.imread(path)
    height, width, _ = pixels.shape
    assert height > 300 and width > 900
    assert pixels[..., :3].std() > 0.01
    return pixels


@pytest.mark.parametrize(
    ("rule", "more"),
    [
        ("adamw", {}),
        ("adamw", {"learn": "lr,beta1", "schedules": {"lr": "piecewise:3", "beta1": "cosine"}}),
        ("alphagrad", {"granularity": {"alpha": "tensor"}, "schedules": {"alpha": "piecewise:2"}}),
        ("sgd", {"learn": "nesterov,momentum"}),
    ],
)
def test_a_result_with_and_without_curves(tuned, tmp_path, rule, more):
    tuned(rule, **more).plot(tmp_path / "plain.png")
    tuned(rule, **more, out=tmp_path / "run").plot(tmp_path / "curves.png")
    plain, curves = (drawn(tmp_path / f"{name}.png") for name in ("plain", "curves"))
    assert plain.shape == curves.shape
    assert (plain != curves).any()


def test_values_that_are_equal_but_for_rounding(tmp_path):
    """As where nothing better than the default was found: it comes back from its logarithm."""
    for value in (0.001, 0.01, 0.9):
        default = torch.full((20, 1), value, dtype=torch.float64)
        learned = default.nextafter(torch.ones_like(default))
        picture = tmp_path / f"{value}.png"
        lines = {"default": default, "learned": learned}
        Drawing(title="", schedules={"lr": lines}, log=frozenset(["lr"])).save(picture)
        assert drawn(picture).any()


def test_every_scheduled_hyper_has_a_panel(tuned):
    result = tuned(schedules={"lr": "piecewise:3", "beta1": "cosine"})
    assert set(drawing_of(result).schedules) == {"lr", "beta1"}
    assert set(drawing_of(tuned()).schedules) == {"lr"}


def test_a_run_that_only_diverged_is_drawn(tuned, tmp_path):
    def exploding(output, target):
        return (1e9 * output - target[:, None]).square().mean()

    result = tuned("sgd", loss_fn=exploding, values={"lr": 1.0}, steps=20, out=tmp_path / "run")
    assert result.loss == math.inf
    drawn(tmp_path / "run" / "schedule.png")


def test_losses_that_are_not_positive_are_drawn(tuned, tmp_path):
    blue = {}
    for level in (5.0, 0.0, -5.0):
        folder = tmp_path / str(level)

        def shifted(output, target, level=level):
            return level + output.square().mean()

        tuned(loss_fn=shifted, out=folder)
        pixels = drawn(folder / "schedule.png")
        evaluations = pixels[:, 2 * pixels.shape[1] // 3 :]
        blue[level] = (evaluations[..., 2] - evaluations[..., 0] > 0.2).sum()
    # As many dots as for positive losses, and more than the one in the legend.
    assert min(blue.values()) > 0.5 * max(blue.values())


def test_several_results_are_compared(tuned, tmp_path):
    one, two = tuned(out=tmp_path / "one"), tuned(route="search", out=tmp_path / "two")
    drawing = compare({"default": one, "descent": one, "tpe": two}, "all of them")
    assert set(drawing.curves) == {"default", "descent", "tpe"}
    drawing.save(tmp_path / "compared.png")
    drawn(tmp_path / "compared.png")


def test_the_ending_chooses_the_format(tuned, tmp_path):
    tuned().plot(tmp_path / "picture.svg")
    assert "<svg" in (tmp_path / "picture.svg").read_text()[:2000]
