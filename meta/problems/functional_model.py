"""A model as a pure function of its weights and buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...inner.core.hyper import Tensors
from .batchnorm import carry_statistics
from .losses import LossFn, scalar_loss
from .modules import (
    autocast_region,
    check_autocast,
    checked_weights,
    copy_modules,
    twice_differentiable,
)
from .seeding import fold_in, fork_rng


class FunctionalModel:
    """What make_model returns for some options, with the weights and buffers as arguments.

    autocast: the dtype to compute in; None for that of the weights. label: of the problem, for
    messages. device: where the weights are.
    """

    def __init__(
        self,
        make_model: Callable[..., nn.Module],
        options: Mapping[str, object],
        autocast: torch.dtype | None,
        label: str,
    ) -> None:
        self._make_model, self._options, self._autocast = make_model, options, autocast
        with fork_rng(0):
            made = make_model(**options)
        weights = checked_weights(made, label)
        check_autocast(autocast, weights, label)
        self.device = weights[0].device
        self.module = copy_modules(made)
        self._recurrent = any(isinstance(m, nn.RNNBase) for m in made.modules())
        carry_statistics(self.module)
        self._mutable = {n for n, _ in self.module.named_buffers()}

    def start(self, seed: int) -> tuple[Tensors, Tensors]:
        """Fresh (weights that are trained, frozen ones and buffers)."""
        with fork_rng(fold_in(seed, 0, 1), self.device):
            model = self._make_model(**self._options)
        params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        frozen = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
        return params, frozen | {n: b.detach() for n, b in model.named_buffers()}

    def __call__(
        self, params: Tensors, buffers: Tensors, inputs: object, *, training: bool
    ) -> tuple[Tensor, Tensors]:
        """(the output, the buffers after it); the buffers given stay as they are."""
        self.module.train(training)
        # Copies, because a module may update its buffers in place; frozen weights stay put.
        copied = self._mutable if training else set()
        state = {**params, **{n: b.clone() if n in copied else b for n, b in buffers.items()}}
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        with twice_differentiable(self._recurrent), autocast_region(self.device, self._autocast):
            # functional_call writes buffers that a module replaced back into this dict.
            output = functional_call(self.module, state, args)
        if self._autocast and isinstance(output, Tensor) and output.dtype == self._autocast:
            output = output.float()  # What is made of it, sums over examples above all, is not low.
        return output, {n: state[n] for n in buffers}

    def loss(self, loss_fn: LossFn, output: object, target: object, **extra: Tensors) -> Tensor:
        """What loss_fn returns, in the dtype that the model computes in."""
        with autocast_region(self.device, self._autocast):
            return loss_fn(output, target, **extra)

    def scalar_loss(
        self, loss_fn: LossFn, output: object, target: object, **extra: Tensors
    ) -> Tensor:
        """The same where it has to be one number; NaN if an output is refused for being NaN."""
        with autocast_region(self.device, self._autocast):
            return scalar_loss(loss_fn, output, target, **extra)


__all__ = ["FunctionalModel"]
