"""The search that chose learning rates, weight decays and alpha of OGM-GE: `python -m mmbal.study.amss_tuning`.

Only validation rows are looked at. Joint training chooses the learning rate and the weight decay, then OGM-GE its alpha
with these. Nothing is chosen for AMSS: what it would make of other learning rates is printed to be read.
"""

from __future__ import annotations

import itertools
import statistics
import sys

import torch

from .amss_arms import OPTIMIZERS, Training, train
from .amss_data import DATA_SETS, load

RATES = {"sgd": (0.01, 0.03, 0.1, 0.3), "adam": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)}
DECAYS = (1e-4, 1e-3, 1e-2)
ALPHAS = (0.03, 0.1, 0.3, 0.8)
SEEDS = (0, 1, 2)


def search(arm: str, loaded: list, candidates: list[Training]) -> dict[Training, tuple[float, float]]:
    """Accuracy and negative loss of each candidate, means of the seeds' validation rows; they are printed too."""
    ranks = {}
    for training in candidates:
        outcomes = [train(arm, data, training, seed) for seed, data in zip(SEEDS, loaded, strict=True)]
        accuracy, loss = (statistics.mean(values) for values in zip(*(o.rank for o in outcomes), strict=True))
        ranks[training] = accuracy, loss
        print(f"{arm:6} {training}: accuracy {100 * accuracy:.2f}, loss {-loss:.4f}", flush=True)
    return ranks


def cautious(ranks: dict[Training, tuple[float, float]]) -> Training:
    """The smallest learning rate within half a point of the best accuracy, with it the best weight decay.

    The very best rate is now and then one at which half of the weight decays diverge.
    """
    best = max(accuracy for accuracy, _ in ranks.values())
    near = [training for training, (accuracy, _) in ranks.items() if accuracy >= best - 0.005]
    rate = min(training.learning_rate for training in near)
    return max((training for training in near if training.learning_rate == rate), key=ranks.__getitem__)


def main(settings: list[str]) -> None:
    """Search for these settings ("clipart-sgd"), or for all of them."""
    torch.set_num_threads(1)
    for data_set, optimizer in itertools.product(DATA_SETS, OPTIMIZERS):
        setting = f"{data_set.name}-{optimizer}"
        if settings and setting not in settings:
            continue
        loaded = [load(data_set, seed) for seed in SEEDS]
        size = optimizer, data_set.epochs, data_set.batch
        grid = [Training(*size, *values, 0.0) for values in itertools.product(RATES[optimizer], DECAYS)]
        best = cautious(search("joint", loaded, grid))
        alphas = [Training(*size, best.learning_rate, best.weight_decay, alpha) for alpha in ALPHAS]
        ranks = search("ogm", loaded, alphas)
        print(f"{setting}: {max(ranks, key=ranks.__getitem__)}", flush=True)
        search("amss", loaded, [Training(*size, rate, best.weight_decay, 0.0) for rate in RATES[optimizer]])


if __name__ == "__main__":
    main(sys.argv[1:])
