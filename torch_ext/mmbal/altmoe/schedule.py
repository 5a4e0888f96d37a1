"""Which direction is trained in which step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmbal.altmoe.state import require
from mmbal.methods.rows import choose, every, ranks


class DirectionSchedule:
    """An endless sequence of directions (or of any tasks), ``steps`` steps for each draw.

        schedule = mmbal.DirectionSchedule.cycle(connector.directions)
        direction = schedule.next()

    Made by :meth:`cycle`, :meth:`weighted` or :meth:`adaptive`. Draws are counted random numbers of (seed, draw): the
    state is a few numbers, and a schedule goes on from it with the directions that it would have given.

    Several processes: ``next(group)`` is a collective call; every rank gets what rank 0 drew. Ranks that are not at the
    same step are an error on all of them; with ``broadcast=False`` so are different draws.
    """

    def __init__(self, kind: str, directions: Sequence[Any], probabilities, steps: int, seed: int, broadcast: bool):
        choose("DirectionSchedule", "kind", kind, ("cycle", "weighted", "adaptive"))
        self.kind, self.directions = kind, list(directions)
        if isinstance(directions, str) or not self.directions or len(set(self.directions)) < len(self.directions):
            raise ValueError(f"DirectionSchedule: directions must be different, at least one, got {directions!r}")
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"DirectionSchedule: steps must be an integer of at least 1, got {steps!r}")
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"DirectionSchedule: seed must be an integer of at least 0, got {seed!r}")
        self.steps, self.seed, self.broadcast = steps, seed, broadcast
        self.count = 0  # steps that were given
        self._p = None if kind == "cycle" else self._normalised(probabilities)
        self._drawn = 0  # number of the direction in use

    @classmethod
    def cycle(cls, directions: Sequence[Any], steps: int = 1, broadcast: bool = True) -> DirectionSchedule:
        """One after the other, in the given order; step i has direction (i // steps) mod their number."""
        return cls("cycle", directions, None, steps, 0, broadcast)

    @classmethod
    def weighted(
        cls, directions: Sequence[Any], probabilities, steps: int = 1, seed: int = 0, broadcast: bool = True
    ) -> DirectionSchedule:
        """Drawn at random; probabilities: a mapping or a sequence in order, in proportion."""
        return cls("weighted", directions, probabilities, steps, seed, broadcast)

    @classmethod
    def adaptive(
        cls,
        directions: Sequence[Any],
        recalls: Mapping[Any, float] | None = None,
        base=None,
        lo: float = 0.0,
        hi: float = 1.0,
        step: float = 1.0,
        steps: int = 1,
        seed: int = 0,
        broadcast: bool = True,
    ) -> DirectionSchedule:
        """Drawn at random, directions with a low recall more often: see :meth:`update`.

        recalls : those known at the start, from 0 to 1. base : probabilities before the first update; all the same
        unless given. lo, hi : bounds of a probability. step : how much of the way to new ones an update goes.
        """
        base = [1.0] * len(directions) if base is None else base
        schedule = cls("adaptive", directions, base, steps, seed, broadcast)
        T = len(schedule.directions)
        if not 0 <= lo <= 1 / T <= hi <= 1:
            raise ValueError(f"DirectionSchedule: lo <= 1 / {T} <= hi must hold, both in [0, 1], got {lo} and {hi}")
        if not 0 < step <= 1:
            raise ValueError(f"DirectionSchedule: step must be in (0, 1], got {step}")
        schedule.lo, schedule.hi, schedule.step = lo, hi, step
        if schedule._p.min() < lo or schedule._p.max() > hi:
            schedule._p = _within(schedule._p, lo, hi)
        if recalls is not None:
            schedule.update(recalls)
        return schedule

    def _normalised(self, given) -> np.ndarray:
        values = [given[d] for d in self.directions] if isinstance(given, Mapping) else list(given)
        p = np.array(values, dtype=np.float64)
        if p.shape != (len(self.directions),) or not np.isfinite(p).all() or (p < 0).any() or p.sum() == 0:
            raise ValueError(
                f"DirectionSchedule: probabilities must be {len(self.directions)} numbers of at least 0, got {given!r}"
            )
        return p / p.sum()

    @property
    def probabilities(self) -> dict[Any, float]:
        """Of the next draw; for a cycle the share of each direction."""
        T = len(self.directions)
        return dict(zip(self.directions, [1 / T] * T if self._p is None else self._p.tolist(), strict=True))

    def update(self, recalls: Mapping[Any, float | Mapping[int, float]], k: int | None = None) -> None:
        """After an evaluation: probabilities move towards ones in proportion to 1 - recall, within lo and hi.

        recalls : for each direction a number from 0 to 1, or {k: recall} as :meth:`mmbal.AlternatingTrainer.evaluate`
        gives; ``k`` says which of them, the smallest unless given.

        The authors adapt probabilities to recalls too, by a rule that they do not publish; this one is mmbal's. Every
        rank must pass the same recalls."""
        if self.kind != "adaptive":
            raise ValueError(f"DirectionSchedule: update is for adaptive schedules, this one is a {self.kind}")
        if lacking := [d for d in self.directions if d not in recalls]:
            raise ValueError(f"DirectionSchedule: recalls must have every direction, got none of {lacking}")
        found = [recalls[d] for d in self.directions]
        missing = [1 - float(r[min(r) if k is None else k] if isinstance(r, Mapping) else r) for r in found]
        if not all(0 <= m <= 1 for m in missing):
            raise ValueError(f"DirectionSchedule: recalls must be from 0 to 1, got {dict(recalls)!r}")
        fresh = self._normalised(missing) if sum(missing) > 0 else np.full(len(missing), 1 / len(missing))
        self._p = _within((1 - self.step) * self._p + self.step * fresh, self.lo, self.hi)

    def _draw(self) -> int:
        turn = self.count // self.steps
        if self.kind == "cycle":
            return turn % len(self.directions)
        if self.count % self.steps:
            return self._drawn
        return int(np.random.default_rng([self.seed, turn]).choice(len(self.directions), p=self._p))

    def next(self, group=None) -> Any:
        """The direction of the next step."""
        drawn = self._draw()
        if ranks(group) > 1:
            found = every(group, [self.count, drawn])
            if (found[:, 0] != found[0, 0]).any():
                raise RuntimeError(f"DirectionSchedule: ranks must be at the same step, got {found[:, 0].tolist()}")
            if not self.broadcast and (found[:, 1] != found[0, 1]).any():
                raise RuntimeError(
                    f"DirectionSchedule: ranks drew different directions: {[self.directions[i] for i in found[:, 1]]}; "
                    "use the same seed and probabilities, or broadcast=True"
                )
            drawn = int(found[0, 1])
        self._drawn = drawn
        self.count += 1
        return self.directions[drawn]

    def __iter__(self):
        while True:
            yield self.next()

    @property
    def position(self) -> tuple[int, int]:
        """Steps that were given, and the number of the direction in use."""
        return self.count, self._drawn

    @position.setter
    def position(self, position: tuple[int, int]) -> None:
        self.count, self._drawn = position

    def state_dict(self) -> dict:
        p = None if self._p is None else self._p.tolist()
        own = {name: getattr(self, name) for name in ("lo", "hi", "step") if self.kind == "adaptive"}
        return {"kind": self.kind, "count": self.count, "seed": self.seed, "drawn": self._drawn, "probabilities": p} | {
            "directions": [repr(d) for d in self.directions],
            "steps": self.steps,
            **own,
        }

    def check_state(self, state: Mapping) -> None:
        """What :meth:`load_state_dict` refuses; changes nothing."""
        mine = self.state_dict()
        require("DirectionSchedule", state, mine)
        for name in ("kind", "directions", "steps", "lo", "hi", "step"):
            if name in mine and state[name] != mine[name]:
                raise ValueError(
                    f"DirectionSchedule: {name} must be {mine[name]} as in this schedule, got {state[name]}"
                )
        T, p = len(self.directions), state["probabilities"]
        for name, end in (("count", None), ("seed", None), ("drawn", T)):
            value = state[name]
            if not isinstance(value, int) or value < 0 or (end is not None and value >= end):
                raise ValueError(f"DirectionSchedule: {name} of a state must be a number in range, got {value!r}")
        if (p is None) != (self._p is None) or (p is not None and abs(self._normalised(p) - p).max() > 1e-6):
            raise ValueError(f"DirectionSchedule: probabilities of a state must be {T} whose sum is 1, got {p!r}")

    def load_state_dict(self, state: Mapping) -> None:
        """Position, probabilities and seed of the state; its form must be this one's."""
        self.check_state(state)
        self.count, self.seed, self._drawn = state["count"], state["seed"], state["drawn"]
        self._p = None if state["probabilities"] is None else np.array(state["probabilities"], dtype=np.float64)


def _within(p: np.ndarray, lo: float, hi: float) -> np.ndarray:
    """The probabilities c p, clipped to lo and hi, whose sum is 1: c by bisection."""
    p = np.maximum(p, 1e-9)  # zeros could not grow
    low, high = 0.0, hi / p.min()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(middle * p, lo, hi).sum() < 1 else (low, middle)
    p = np.clip(high * p, lo, hi)
    return p / p.sum()
