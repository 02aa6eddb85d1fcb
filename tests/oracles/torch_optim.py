"""Rules of torch.optim."""

from functools import partial

import torch
from oracle import Reference


def of(make, **fixed):
    return Reference(partial(make, foreach=False, **fixed), own_defaults=True)


REFERENCE = {
    "adagrad": of(torch.optim.Adagrad),
    "adam": of(torch.optim.Adam),
    "adamw": of(torch.optim.AdamW),
    "amsgrad": of(torch.optim.Adam, amsgrad=True),
    "nadam": of(torch.optim.NAdam),
    "radam": of(torch.optim.RAdam),
    "rmsprop": of(torch.optim.RMSprop),
    "sgd": of(torch.optim.SGD),
}
