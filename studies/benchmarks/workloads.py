"""What the benchmark of metagradients trains, and on what: real data, fixed seeds, any dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...inner.core.messages import unknown
from ...meta.problems.module_problem import ModuleProblem, problem_from_module
from ..data_files import find_file
from ..measure.device import CPU
from ..problems import Part, digits_mlp

SEED = 0
# Of the language model: enough for ratios to settle, few enough for peers that keep every graph.
GPT_STEPS, GPT_JUDGED = 20, 5
_TEXT, _BLOCK = "tinyshakespeare.txt", 128
# The 65 characters of the text, whichever of them an excerpt lacks.
_CHARACTERS = "\n !$&',-.3:;?" + "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, eq=False)
class Workload:
    """`steps` updates by torch's Adam or SGD, differentiated in all of values.

    values: hypers of the rule by the name they have here. model: makes a float32 model. parts: the
    data to train on and held out. judged: steps at which derivatives are compared with finite
    differences, 0 for not at all. large: too much for a CPU or for graphs of all steps; it is run
    only where it is named, and once. autocast: the type of the model's products, if another.
    """

    name: str
    what: str
    rule: str
    values: Mapping[str, float]
    steps: int
    model: Callable[[], nn.Module]
    parts: Callable[[], tuple[Part, Part]]
    batch: int
    judged: int
    large: bool = False
    autocast: torch.dtype | None = None
    device: torch.device = CPU

    def problem(self, dtype: torch.dtype, autocast: torch.dtype | None = None) -> ModuleProblem:
        """The same weights, batches and held-out data for every method."""
        train, valid = ((x.to(dtype) if x.is_floating_point() else x, y) for x, y in self.parts())
        made = partial(_placed, self.model, dtype, self.device)
        return problem_from_module(
            made,
            mean_loss,
            train,
            valid,
            batch_size=self.batch,
            autocast=autocast or self.autocast,
            name=self.name,
        )

    def at(self, steps: int) -> Workload:
        return replace(self, steps=steps)

    def on(self, device: torch.device) -> Workload:
        """With the model, the batches and all that is made of them there."""
        return replace(self, device=device)


def mean_loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy per example, or per character of every example."""
    return functional.cross_entropy(output.flatten(0, -2), target.flatten())


def perceptron(width: int) -> nn.Module:
    """64-width-width-10. Three pixels are 0 in all digits: 3 width weights never see a gradient."""
    return nn.Sequential(
        nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)
    )


def convolutions(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, width, 3, padding=1),
        nn.GroupNorm(4, width),
        nn.SiLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.GroupNorm(4, 2 * width),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 64, 10),
    )


class Block(nn.Module):
    """Attention and perceptron, each normalized before and added after."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1))
        # batch, time, (q, k, v), head, channel -> (q, k, v), batch, head, time, channel
        q, k, v = split.permute(2, 0, 3, 1, 4)
        heads = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).flatten(-2))
        mixed: Tensor = x + self.mlp(self.before_mlp(x))
        return mixed


class GPT(nn.Module):
    """A language model without dropout, its head the transposed embedding.

    vocabulary, context: the rows of its two embeddings, which may be more than a text needs.
    Radford et al. 2019, in the form of nanoGPT.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        vocabulary: int = len(_CHARACTERS),
        context: int = _BLOCK,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = self.positions.weight[: tokens.shape[1]]
        hidden = self.norm(self.blocks(self.embedding(tokens) + positions))
        return functional.linear(hidden, self.embedding.weight)


def digits() -> tuple[Part, Part]:
    """897 digits of 8 x 8 pixels between 0 and 1 to train on, 450 held out."""
    splits = digits_mlp().splits
    (train, train_target), (valid, valid_target) = (splits[s].whole() for s in ("train", "valid"))
    if isinstance(train, tuple) or isinstance(valid, tuple):
        raise TypeError("the digits are several tensors per example; one was expected")
    return (train, train_target), (valid, valid_target)


def text() -> tuple[Part, Part]:
    """Blocks of the first nine tenths to train on; 8 blocks of the last tenth held out."""
    tokens = _tokens(_text_file())
    blocks = (len(tokens) - 1) // _BLOCK
    inputs, target = (tokens[i : i + blocks * _BLOCK].view(blocks, _BLOCK) for i in (0, 1))
    train = blocks * 9 // 10
    held_out = torch.linspace(train, blocks - 1, 8).long()
    return (inputs[:train], target[:train]), (inputs[held_out], target[held_out])


def _text_file() -> Path:
    return find_file(_TEXT, "the 1.1 MB of Shakespeare that char-rnn and nanoGPT train on")


@lru_cache(maxsize=1)
def _tokens(file: Path) -> Tensor:
    codes = {character: i for i, character in enumerate(_CHARACTERS)}
    read = file.read_text(encoding="utf-8")
    odd = sorted(set(read) - set(codes))
    if odd or len(read) <= 80 * _BLOCK:
        found = f"holds {odd[0]!r}" if odd else f"has {len(read)} characters"
        raise ValueError(
            f"{_TEXT} {found}; it must be over {80 * _BLOCK} characters of {_CHARACTERS!r}"
        )
    return torch.tensor([codes[character] for character in read])


def _placed(model: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device) -> nn.Module:
    return model().to(device, dtype)


_SGD = {"lr": 0.1, "momentum": 0.9}
_ADAM = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999}


def _gpt2(name: str, steps: int) -> Workload:
    model, values = partial(GPT, 12, 768, 12, 50_257, 1024), _ADAM | {"lr": 1e-4}
    low = torch.bfloat16
    return Workload(name, _GPT2, "adam", values, steps, model, text, 8, 0, large=True, autocast=low)


def _mlp(name: str, rule: str, steps: int) -> Workload:
    what = "MLP 64-128-128-10, tanh, on 8x8 digits"
    values = _SGD if rule == "sgd" else _ADAM
    return Workload(name, what, rule, values, steps, partial(perceptron, 128), digits, 128, 100)


_CNN = "CNN, two 3x3 convolutions (16, 32 channels), GroupNorm, SiLU, on 8x8 digits"
_BLOCKS = f"on blocks of {_BLOCK} characters of Shakespeare"
_GPT = f"GPT, 4 layers, width 128, 4 heads, {_BLOCKS}"
_GPT2 = (
    "GPT-2 of 124M weights (12 layers, width 768, 12 heads, 50,257 rows of tokens, of which the "
    f"text has {len(_CHARACTERS)}, and 1,024 of positions), bfloat16 autocast, {_BLOCKS}"
)
WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        _mlp("w1-sgd", "sgd", 100),
        _mlp("w1-adam", "adam", 100),
        _mlp("w2-sgd", "sgd", 1000),
        _mlp("w2-adam", "adam", 1000),
        _mlp("w2-adam-10k", "adam", 10_000),
        Workload("w3", _CNN, "adam", _ADAM, 100, partial(convolutions, 16), digits, 128, 100),
        Workload(
            "w4", _GPT, "adam", _ADAM, GPT_STEPS, partial(GPT, 4, 128, 4), text, 8, GPT_JUDGED
        ),
        _gpt2("gpt2", 500),
        _gpt2("gpt2-short", 10),
    )
}


def find_workloads(names: Iterable[str]) -> list[Workload]:
    """By name, in the order given; for no names all but the large ones."""
    names = list(dict.fromkeys(names)) or [n for n, w in WORKLOADS.items() if not w.large]
    for name in names:
        if name not in WORKLOADS:
            raise ValueError(unknown("there is no workload", name, WORKLOADS))
    return [WORKLOADS[name] for name in names]


__all__ = ["WORKLOADS", "Workload", "find_workloads"]
