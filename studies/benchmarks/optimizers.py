"""The benchmark of the drop-in optimizers: a step's time and memory, as rules are written and
compiled, beside torch.optim's foreach and fused forms and, where it has no such rule, beside
pytorch_optimizer's.

All step the same weights along the same gradients, one after the other in every round. Memory is
the growth over weights and gradients, state included, in a process of its own.
"""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ...inner.core.messages import unknown
from ...inner.registry import RULES
from ...inner.torch_form.optimizer import torch_form
from ..measure.device import CPU, gpu_name, synchronize
from ..measure.memory_meter import meter_of, return_freed_blocks
from ..measure.timing import Grown, Say, check_repeats, interleaved, reason, run_isolated

Maker = Callable[[Sequence[Tensor]], torch.optim.Optimizer]
# Seconds of a round, by which steps are counted that are shorter, and at most so many of them.
_ROUND, _MOST = 0.25, 100
# Steps for memory, so that rules that wait for their averages are past that, unless they take so
# many seconds; and the seconds after which a process is ended.
_GROWING, _PATIENCE, _LIMIT = 8, 20.0, 300.0
SEED = 0
# The sides of a comparison: ours as a rule is written and compiled, theirs (torch's is foreach),
# and torch's fused form where there is one.
OURS, COMPILED, THEIRS, FUSED = "ours", "compiled", "theirs", "fused"


@dataclass(frozen=True)
class Model:
    """The shapes of a model's tensors."""

    name: str
    what: str
    shapes: tuple[tuple[int, ...], ...]

    def parameters(self, device: torch.device) -> list[Tensor]:
        """Weights with gradients, the same every time."""
        draw = torch.Generator().manual_seed(SEED)
        made: list[Tensor] = []
        for shape in self.shapes:
            p = torch.nn.Parameter((0.02 * torch.randn(shape, generator=draw)).to(device))
            p.grad = torch.randn(shape, generator=draw).to(device)
            made.append(p)
        return made

    @property
    def numel(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)


def _transformer(width: int, depth: int, words: int) -> tuple[tuple[int, ...], ...]:
    block = [(3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    block += [(width,)] * 4
    return ((words, width), *(block * depth), (width,), (width,))


MODELS = {
    made.name: made
    for made in (
        Model("12m", "a transformer of 4 blocks of width 384", _transformer(384, 4, 12_800)),
        Model("small", "2,000 tensors of 16 to 1,024 weights",
              tuple([(16, 32), (32,), (64, 16), (16,)] * 500)),
    )
}  # fmt: skip


def _matrices_apart(params: Sequence[Tensor]) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in params if p.ndim > 1], "use_muon": True},
        {"params": [p for p in params if p.ndim <= 1], "use_muon": False},
    ]


@dataclass(frozen=True)
class Rival:
    """Another library's form of a rule. forms: its ways of doing a step, by name, and what asks for
    them. grouped: parameters as it takes them.
    """

    library: str
    title: str
    given: Mapping[str, Any] = field(default_factory=dict)
    forms: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {THEIRS: {}})
    grouped: Callable[[Sequence[Tensor]], Sequence[Any]] = list

    @property
    def missing(self) -> str:
        """Why it cannot be measured; empty where it can."""
        return "" if find_spec(self.library.partition(".")[0]) else f"{self.library} is not here"

    def make(self, params: Sequence[Tensor], form: str = "") -> torch.optim.Optimizer:
        made: Callable[..., torch.optim.Optimizer]
        made = getattr(importlib.import_module(self.library), self.title)
        asked = self.forms[form or next(iter(self.forms))]
        return made(self.grouped(params), **self.given, **asked)


def _torch(title: str, *, fused: bool = False, **given: Any) -> Rival:
    """fused: whether torch has that form of it."""
    forms = {THEIRS: {"foreach": True}, **({FUSED: {"fused": True}} if fused else {})}
    return Rival("torch.optim", title, {"lr": 1e-3, **given}, forms)


def _other(title: str, **given: Any) -> Rival:
    return Rival("pytorch_optimizer", title, {"lr": 1e-3, **given})


# By rule, what its drop-in form is measured against, and what both are given beside lr.
RIVALS: dict[str, tuple[Rival, dict[str, Any]]] = {
    "sgd": (_torch("SGD", fused=True, momentum=0.9), {"momentum": 0.9}),
    "adam": (_torch("Adam", fused=True), {}),
    "adamw": (_torch("AdamW", fused=True), {}),
    "amsgrad": (_torch("Adam", fused=True, amsgrad=True), {}),
    "nadam": (_torch("NAdam"), {}),
    "radam": (_torch("RAdam"), {}),
    "rmsprop": (_torch("RMSprop"), {}),
    "adagrad": (_torch("Adagrad", fused=True), {}),
    "adabelief": (_other("AdaBelief", rectify=True), {}),
    "adan": (_other("Adan"), {}),
    "ademamix": (_other("AdEMAMix", weight_decouple=True), {}),
    "grams": (_other("Grams"), {}),
    "ano": (_other("Ano"), {}),
    "lion": (_other("Lion"), {}),
    "signsgd": (_other("SignSGD", momentum=0.0), {}),
    "signum": (_other("SignSGD", momentum=0.9), {}),
    "schedulefreesgd": (_other("ScheduleFreeSGD"), {}),
    "schedulefreeadamw": (_other("ScheduleFreeAdamW"), {}),
    "prodigy": (_other("Prodigy"), {}),
    "muon": (replace(_other("Muon"), grouped=_matrices_apart), {}),
    "shampoo": (_other("Shampoo"), {}),
    "scion": (_other("SCION"), {}),
}


@dataclass(frozen=True)
class Row:
    """A rule on a model, by side. seconds: per step, one per round. grown: memory. first: seconds
    of the first compiled step. left_out: why a side was not measured.
    """

    model: str
    rule: str
    over: str
    rival: str
    seconds: Mapping[str, list[float]] = field(default_factory=dict)
    grown: Mapping[str, Grown] = field(default_factory=dict)
    first: float | None = None
    gpu: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict)

    def ratios(self, side: str, other: str) -> list[float]:
        """One per round; none where a side was left out."""
        if not {side, other} <= set(self.seconds):
            return []
        pairs = zip(self.seconds[side], self.seconds[other], strict=True)
        return [mine / theirs for mine, theirs in pairs]


def find_models(names: Sequence[str]) -> list[Model]:
    """The models called so, all if none is."""
    return [_found("model", name, MODELS) for name in names or MODELS]


def find_rivals(names: Sequence[str]) -> list[str]:
    """The rules called so that something can be measured against, all of those if none is."""
    for name in names:
        _found("rule with a rival", name, RIVALS)
    return list(names) or [name for name in RIVALS if name in RULES]


def _found(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise ValueError(unknown(f"there is no {kind}", name, known))
    return known[name]


def bench_optimizers(
    models: Sequence[Model],
    rules: Sequence[str],
    *,
    repeats: int = 9,
    device: torch.device = CPU,
    say: Say = lambda told: None,
) -> Iterator[Row]:
    """Each rule on each model beside its rival, as it is measured."""
    check_repeats(repeats)
    for model in models:
        for name in rules:
            yield _row(model, name, repeats, device, say)


def _row(model: Model, name: str, repeats: int, device: torch.device, say: Say) -> Row:
    rival, _ = RIVALS[name]
    row = Row(model.name, name, RULES[name].over, f"{rival.library}.{rival.title}")
    left_out: dict[str, str] = {}
    grown: dict[str, Grown] = {}
    steps: dict[str, Steps] = {}
    for side in (OURS, COMPILED, *rival.forms):
        if rival.missing and side in rival.forms:
            left_out[side] = rival.missing
            continue
        say(f"{model.name}, {name}: memory, {side}")
        grown[side] = run_isolated(memory_of, model, name, side, device, limit=_LIMIT)
        if grown[side].left_out:
            left_out[side] = grown[side].left_out
            continue
        try:
            optimizer = _maker(name, side)(model.parameters(device))
            made = Steps(optimizer, device, strict=side == COMPILED)
            made()  # What fails, fails here; the other sides are measured.
            steps[side] = made
        except Exception as error:  # Of whatever kind a library raises.
            left_out[side] = reason(error)
    seconds = _seconds(steps, repeats, device, lambda told: say(f"{model.name}, {name}: {told}"))
    first = steps[COMPILED].first if COMPILED in steps else None
    return replace(
        row,
        seconds=seconds,
        grown=grown,
        first=first,
        gpu=gpu_name(device),
        left_out=left_out,
    )


def _seconds(
    steps: Mapping[str, Steps], repeats: int, device: torch.device, say: Say
) -> dict[str, list[float]]:
    if not steps:
        return {}
    seconds, _ = interleaved(steps, repeats, say, synchronize=partial(synchronize, device))
    return {side: [s / steps[side].count for s in each] for side, each in seconds.items()}


def _maker(name: str, side: str) -> Maker:
    if side in (OURS, COMPILED):
        return partial(_ours, name, compile=side == COMPILED)
    return partial(RIVALS[name][0].make, form=side)


def _ours(name: str, params: Sequence[Tensor], *, compile: bool = False) -> torch.optim.Optimizer:
    return torch_form(RULES[name])(params, lr=1e-3, compile=compile, **RIVALS[name][1])


class Steps:
    """A round of an optimizer: as many steps as fill one, which the first call finds out. first:
    seconds of its first step. strict: whether a warning is an error, as of what is not compiled.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, device: torch.device, *, strict: bool = False
    ) -> None:
        self.count, self.first = 0, 0.0
        self._optimizer, self._device, self._strict = optimizer, device, strict

    def __call__(self) -> None:
        if not self.count:
            begun = time.perf_counter()
            with warnings.catch_warnings():
                if self._strict:
                    warnings.simplefilter("error", UserWarning)
                self._optimizer.step()  # It begins its state.
            synchronize(self._device)
            self.first = time.perf_counter() - begun
            begun = time.perf_counter()
            self._optimizer.step()
            synchronize(self._device)
            self.count = steps_of(time.perf_counter() - begun)
            return
        for _ in range(self.count):
            self._optimizer.step()


def steps_of(seconds: float) -> int:
    """Those of a round, where one takes so long."""
    return max(1, min(_MOST, round(_ROUND / max(seconds, _ROUND / _MOST))))


def memory_of(model: Model, name: str, who: str, device: torch.device) -> Grown:
    """In this process: what an optimizer takes beside weights and gradients, its state included."""
    return_freed_blocks()
    params, make = model.parameters(device), _maker(name, who)
    # What the first call of a library brings along is no part of it.
    _several(make(Model("", "", ((8, 8), (8,))).parameters(device)))
    meter = meter_of(device)
    _several(make(params))
    return Grown(meter.mib, meter.exact)


def _several(optimizer: torch.optim.Optimizer) -> None:
    begun = time.perf_counter()
    for i in range(_GROWING):
        optimizer.step()
        if i and time.perf_counter() - begun > _PATIENCE:
            break


__all__ = [
    "COMPILED",
    "FUSED",
    "MODELS",
    "OURS",
    "RIVALS",
    "THEIRS",
    "Model",
    "Rival",
    "Row",
    "Steps",
    "bench_optimizers",
    "find_models",
    "find_rivals",
    "memory_of",
    "steps_of",
]
