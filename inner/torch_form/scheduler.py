"""A learned schedule as a torch LRScheduler, for any optimizer whose groups have the names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class HyperScheduler(LRScheduler):
    """Sets scheduled hyperparameters of every parameter group, step by step.

    tables: for each name ("lr", "beta1", "momentum", …) its value at steps 0 … T-1, or one such
    sequence per parameter group. After the last step the last value stays. beta1, beta2, ... are
    written into a group's "betas" where it has that tuple. Call step() after every optimizer step.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        tables: Mapping[str, Sequence[float] | Sequence[Sequence[float]]],
        last_epoch: int = -1,
    ) -> None:
        count = len(optimizer.param_groups)
        self.tables: dict[str, list[Sequence[float]]] = {}
        for name, table in tables.items():
            nested = len(table) > 0 and isinstance(table[0], Sequence)
            self.tables[name] = list(table) if nested else [table] * count  # type: ignore[arg-type,list-item]
            if len(self.tables[name]) != count:
                raise ValueError(_uneven(name, len(self.tables[name]), count))
            if any(len(each) == 0 for each in self.tables[name]):
                raise ValueError(f"a table of {name} is empty; give its value at every step")
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of every group now; the other scheduled hypers are set on the way."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for name, per_group in self.tables.items():
            if len(per_group) != len(rates):
                raise ValueError(_uneven(name, len(per_group), len(rates)))
            for i, (group, table) in enumerate(
                zip(self.optimizer.param_groups, per_group, strict=True)
            ):
                value = table[min(self.last_epoch, len(table) - 1)]
                if name == "lr":
                    rates[i] = value
                elif re.fullmatch(r"beta[1-9]", name) and "betas" in group:
                    betas = list(group["betas"])
                    betas[int(name.removeprefix("beta")) - 1] = value
                    group["betas"] = tuple(betas)
                elif name in group:
                    group[name] = value
                else:
                    raise ValueError(
                        f"{type(self.optimizer).__name__} has no {name!r} to schedule; its groups "
                        f"hold {', '.join(k for k in group if k != 'params')}"
                    )
        return rates


def _uneven(name: str, tables: int, groups: int) -> str:
    return (
        f"{name} has {tables} schedules for {groups} parameter groups; give one for each, and add "
        "groups to the optimizer before the scheduler is made"
    )
