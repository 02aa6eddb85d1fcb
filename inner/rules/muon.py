"""Muon: momentum made nearly orthogonal. Jordan et al. 2024, kellerjordan.github.io/posts/muon.

Matrices, the kernels of convolutions as outputs x rest, take an average of gradients whose
singular values five polynomial steps bring near 1, and not nearer: within [0.68, 1.14] where they
were above 1% of the norm. Everything else is Adam's, with hypers that begin with aux_. Embeddings
and the last layer are matrices too; their authors leave them to Adam: partition("muon", "adamw",
where=...) does, and aux_ hypers then mean nothing.

ns_coefficients: the constant ones of the post, or "quintic", a row for each step, which ends
within [0.978, 1.032]. scale: "keller", sqrt(max(1, m/n)), of the author's code; "moonlight", 0.2
sqrt(max(m, n)), the size of AdamW's steps, so that its lr and weight_decay serve (Liu et al.,
arXiv:2502.16982); "spectral", sqrt(m/n), of the same norm between features for every width (Pethick
et al., arXiv:2502.07529). The author's code takes m and n of a convolution from its last two
dimensions, here they are those of the matrix that is made orthogonal.

Computed in at least float32, not in the authors' bfloat16, whose noise slopes would multiply. An
average and a sum as momentum are the same rule: the steps do not see the norm.
"""

from ..core.hyper import Choice, Integer, decay, positive, weight_decay
from ..numerics.newton_schulz import JORDAN, QUINTIC, first, polar
from .matrices import as_matrix, averaged, shape_factor, with_adam

_BOTH = {
    "lr": positive(0.02, search=(1e-4, 1.0)),
    "momentum": decay(0.95),
    "weight_decay": weight_decay(0.0),
    "scale": Choice("keller", ("keller", "moonlight", "spectral")),
}


def muon_matrix(p, g, s, t, lr, momentum, weight_decay, ns_steps, ns_coefficients, scale, nesterov):
    u, s = averaged(g, s, momentum, nesterov)
    rows = {"jordan": JORDAN, "quintic": QUINTIC}[ns_coefficients]
    o = polar(as_matrix(u), first(rows, ns_steps)).view_as(p)
    return (1 - lr * weight_decay) * p - lr * shape_factor(p, scale) * o, s


muon = with_adam(
    "Muon",
    muon_matrix,
    **_BOTH,
    ns_steps=Integer(5, 1, 20),
    ns_coefficients=Choice("jordan", ("jordan", "quintic")),
    nesterov=Choice(True, (True, False)),
)


def turbo_muon_matrix(p, g, s, t, lr, momentum, weight_decay, ns_steps, scale):
    """Turbo-Muon: Muon from a better start. Boissin et al. 2025, arXiv:2512.04632.

    In place of the norm of the whole matrix, each row of it (column, where it is tall) is divided
    by what makes the whole a contraction, almost orthogonal layers (Prach & Lampert 2022,
    arXiv:2208.03160): singular values begin so near 1 that the last four rows of Muon's quintic
    coefficients do. As the authors' code (thib-s/flash-newton-schulz, NS_ours), with an earlier
    row for every further step. The limit is not quite the polar factor, for rows are scaled; rows
    below 3e-4 are not scaled up in full. In at least float32. Everything else is as in Muon, with
    Nesterov's average.
    """
    u, s = averaged(g, s, momentum)
    # Past five steps the last row again: of the rest, only it leaves what is near 1 there.
    rows = first(QUINTIC[-ns_steps:], ns_steps)
    o = polar(as_matrix(u), rows, start="aol").view_as(p)
    return (1 - lr * weight_decay) * p - lr * shape_factor(p, scale) * o, s


turbo_muon = with_adam("TurboMuon", turbo_muon_matrix, **_BOTH, ns_steps=Integer(4, 1, 20))
