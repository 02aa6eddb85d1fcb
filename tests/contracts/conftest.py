"""One thread: on a busy machine two of them take minutes over vectors of seven numbers."""

import torch

torch.set_num_threads(1)
