"""The registry of rules as a table for the README."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from ..inner.core.layout import Layout
from ..inner.core.rule import Rule
from ..studies.measure.markdown import markdown

# The matrix whose slots are counted: neither square nor small.
_LIKE = torch.Size([512, 256])
HEADER = ["rule", "paper", "hyperparameters", "options", "memory", "smooth"]
MARKS = ("<!-- rules: made by `hyperdescent rules --markdown` -->", "<!-- /rules -->")


def row(rule: Rule) -> list[str]:
    """A rule's name, paper, hypers with their defaults, options, memory and what is not smooth."""
    hypers = ", ".join(f"{n} {h.default:g}" for n, h in rule.hypers.items())
    options = ", ".join(f"{n}={v}" for n, v in rule.options().items())
    return [rule.title, paper(rule), hypers, options, memory(rule), smoothness(rule)]


def paper(rule: Rule) -> str:
    """Where it was published: the first reference of its docstring."""
    found = re.search(
        r"arXiv:(\d{4}\.\d{4,5})|doi:(\S+?)[,.;)]?\s|((?:\w+\.)+\w+/[^\s,;)]+)", rule.doc
    )
    if not found:
        return ""
    arxiv, doi, address = found.groups()
    if arxiv:
        return f"[{arxiv}](https://arxiv.org/abs/{arxiv})"
    target = f"doi.org/{doi}" if doi else address.rstrip(".")
    return f"[{target.partition('/')[0]}](https://{target})"


def memory(rule: Rule) -> str:
    """The numbers that slots hold per weight, of a matrix of 512 x 256."""
    p = torch.zeros(_LIKE)
    unit, layout = (
        (p, Layout.alone(_LIKE)) if rule.over != "model" else (p.view(-1), Layout.alone(_LIKE))
    )
    slots = rule.init(unit, rule.values(), layout)
    return f"{sum(map(Tensor.numel, slots.values())) / p.numel():.2f}".rstrip("0").rstrip(".")


def smoothness(rule: Rule) -> str:
    """The hypers whose derivative is no guide, and what gives it back."""
    rough = rule.rough()
    if "smooth" not in rule.choices:
        return f"not in {', '.join(rough)}" if rough else "yes"
    left = rule.choose(smooth=True).rough()
    given = ", ".join(n for n in rough if n not in left)
    told = [f"in {given} with smooth=True"] * bool(given) + [f"not in {', '.join(left)}"] * bool(
        left
    )
    return "; ".join(told) or "yes; smooth=True for its signs and masks"


def table(rules: Iterable[Rule]) -> str:
    """The Markdown between the README's marks."""
    rows = [row(rule) for rule in rules]
    return "\n".join([MARKS[0], markdown(HEADER, rows), MARKS[1]])


__all__ = ["HEADER", "MARKS", "memory", "paper", "row", "smoothness", "table"]
