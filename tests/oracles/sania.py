"""SANIA by its equations, the root's argument as the formula of its bend."""

import numpy as np
from oracle import Plain, Reference


class SANIA(Plain):
    model = True

    def update(self, p, g, s, t, loss, lr, beta2, eps, f_star, tau, form, is_sqrt):
        q, steps = 0.0, []
        for i, each in enumerate(g):
            before = s.get(i, np.zeros_like(each))
            if form == "adagrad":
                s[i] = b = before + each**2
            else:
                s[i] = beta2 * before + (1 - beta2) * each**2
                b = s[i] / (1 - beta2**t)
            b = np.sqrt(b + eps) if is_sqrt else b + eps
            steps.append(each / b)
            q += (each * steps[-1]).sum()
        x = 1 - 2 * (loss - f_star) / q
        # The two roots of y² - x y = tau² / 4 multiply to -tau² / 4: the larger one is precise.
        larger = (abs(x) + np.hypot(x, tau)) / 2
        y = larger if x > 0 else tau**2 / 4 / larger
        return [a - lr * (1 - np.sqrt(y)) * d for a, d in zip(p, steps, strict=True)]


REFERENCE = {
    "sania": Reference(
        SANIA,
        # Near the losses of the path, where the square root is not cut off.
        point={"lr": 1.0, "f_star": 19.0, "tau": 0.5, "eps": 0.5},
    )
}
