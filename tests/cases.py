"""Every score, loss and schedule of the library; a new row here is covered by all their tests."""

from functools import partial

from sage_select import Constant, Linear, dpo, nca, scores

SCORES = {
    "sage": scores.sage,
    "log_sage": scores.log_sage,
    "sage, no length": partial(scores.sage, length_norm="none"),
    "sage, sqrt length": partial(scores.sage, length_norm="sqrt"),
    "sage, stratified": partial(scores.sage, length_norm="stratified"),
    "without_gradient": scores.without_gradient,
    "without_curvature": scores.without_curvature,
    "gradient_slope": scores.gradient_slope,
    "dpo_newton": scores.dpo_newton,
    "nca_newton": scores.nca_newton,
    "smallest_margin": scores.smallest_margin,
    "largest_margin": scores.largest_margin,
    "shortest": scores.shortest,
    "random": scores.random,
    "highest dpo loss": dpo,
    "highest nca loss": nca,
}

LOSSES = {"dpo": dpo, "nca": nca}

SCHEDULES = {
    "constant": Constant(0.4),
    "linear": Linear(1.0, 0.4),
    "shares": Linear((0.9, 0.1, 0.0), (0.4, 0.4, 0.2)),
}
