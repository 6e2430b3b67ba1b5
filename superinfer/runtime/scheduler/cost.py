"""How long a step takes: a roofline with eight coefficients, seeded from a hardware profile and fitted while it runs.

    t = max(w W, f F) + k K + a A + d D + o O + p P + e E        seconds

    W  reading the weights the step's tokens need         F  the matmuls' FLOP, over all tokens computed
    K  reading the KV cache, over all positions read      A  attention's FLOP, prefill only
    D  the number of decoding requests                    O  one a step
    P  launching prefill chunks in a step of at most      E  the same in a longer step: kernel by kernel
       `StepRates.captured` tokens, as CUDA graphs

Each capital is the seed's own estimate in seconds, from the profile's rates; each small letter is a factor, 1 until
steps have been observed, and never negative. P and E are LAUNCH_S at least, so that they can be learnt where the
profile says nothing of them; their factors begin at what it says. The maximum is because a step's matmuls either wait
for weights or for the tensor cores; the other terms run one after another on the device.

`StepCost.observe` is recursive least squares in information form: A <- l A + w x x', b <- l b + w y x, with l the
forgetting factor and a weak prior that keeps a factor near 1 while nothing tells it apart. Rows are divided by the
predicted time, so that it is relative errors that are squared. Outliers (a first call that compiles, a pause of the
host) get Huber's weight w = c/|error| beyond c = 3 times the median error.

CHANGED outliers in a row, all of them too long or all too short, are none: the machine has become slower, or quicker,
as when others begin to use it, or its clocks change. What was learnt is then learnt anew at once: b and the prior are
multiplied by the median of took / predicted of these steps, which does the same to all factors.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from operator import mul
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from superinfer.runtime.scheduler.plan import StepPlan

if TYPE_CHECKING:
    from superinfer.runtime.sim.hardware import HardwareProfile
    from superinfer.runtime.sim.shapes import ModelShape

FACTORS = ("weights", "matmul", "kv", "attention", "decode", "step", "pieces", "eager")
LAUNCH_S = 1e-3
FORGETTING = 0.998  # the last 500 steps count: 10 s at 20 ms a step
PRIOR = 0.004  # weight of the seed in observations: a 3 % noise against a seed trusted to 50 %
RIDGE = PRIOR * np.eye(len(FACTORS))
OUTLIER = 3.0  # median errors beyond which an observation counts less
LEAST_OUTLIER = 0.02  # relative error that is never an outlier
SOLVE_EVERY = 8  # observations, after the first: solving takes as long as planning
WINDOW = 512  # observations the reported error is over
CHANGED = 16  # steps: 0.2 s of a GPU, 1 to 2 s of a CPU
SETTLED = 64  # observations before that: a seed that is wrong is wrong in one term, and is learnt term by term


Amount = TypeVar("Amount", float, np.ndarray)


class StepLoad(NamedTuple):
    """What a step computes. tokens: all of them. decodes: requests that compute one.

    kv_read: cached positions that decodes attend to and that prefill chunks begin after.
    pairs: (position, attended position) pairs of prefill chunks.
    """

    tokens: int
    decodes: int
    kv_read: int
    pairs: float

    @classmethod
    def of(cls, plan: StepPlan) -> StepLoad:
        """The load of a plan."""
        decodes, prefill, pairs = len(plan.decodes), 0, 0.0
        kv_read = int(plan.decodes.positions.sum()) + decodes
        for work in plan.others:
            if work.tokens and not work.is_one_step:
                prefill += work.length
                kv_read += work.start
                pairs += work.length * (work.start + (work.length + 1) / 2)
            else:
                decodes += 1
                kv_read += work.start + 1
        return cls(prefill + decodes, decodes, kv_read, pairs)


class UnitCosts(NamedTuple):
    """Seconds for one unit each, as learnt by now. weights_s: reading a full batch's; the rest as in `StepRates`."""

    weights_s: float
    token_s: float
    kv_s: float
    pair_s: float
    decode_s: float
    step_s: float
    pieces_s: float = 0.0
    eager_s: float = 0.0
    captured: int = 1024

    def prefill_s(self, tokens: Amount, start: Amount | float = 0.0) -> Amount:
        """Computing `tokens` positions of a prompt from `start` on, in steps as full as graphs take; also of arrays."""
        return tokens * (self.token_s + self.pieces_s / self.captured + self.pair_s * (start + tokens / 2))

    def chunk_s(self, tokens: float, start: float = 1000.0) -> float:
        """`tokens` of a prompt's chunks that begin at `start` or so, in a step that is launched anyway."""
        return tokens * (self.token_s + self.pair_s * start)

    def launch_s(self, tokens: int) -> float:
        """What launching costs a step of so many tokens that has prefill chunks, beside the rest."""
        return self.pieces_s if tokens <= self.captured else self.eager_s


class StepRates(NamedTuple):
    """The seed: seconds for each unit of a `StepLoad` on one machine for one model.

    dense_s: reading the weights every token needs; expert_s: those of all experts; idle_share: of the experts, the
    share that one token leaves unread (0 for a dense model). captured: tokens of the largest step with prefill chunks
    that graphs replay.
    """

    dense_s: float
    expert_s: float
    idle_share: float
    token_s: float
    kv_s: float
    pair_s: float
    decode_s: float
    step_s: float
    pieces_s: float = 0.0
    eager_s: float = 0.0
    captured: int = 1024

    @classmethod
    def unknown(cls) -> StepRates:
        """Of a machine nobody described: orders of magnitude (an 8B model on a 3 TB/s GPU), to be learnt away from."""
        return cls(5e-3, 0.0, 0.0, 2e-5, 5e-8, 1e-9, 1e-5, 1e-3)

    @classmethod
    def seed(cls, profile: HardwareProfile, shape: ModelShape) -> StepRates:
        """From what the machine's datasheet and measurements, and the model's shape, say."""
        share = profile.efficiency
        weights_rate = profile.memory_rate * share.weights
        dense = shape.read_bytes(0)
        return cls(
            dense_s=dense / weights_rate,
            expert_s=shape.layers * shape.experts * shape.expert_params * shape.dtype_bytes / weights_rate,
            idle_share=1.0 - shape.active_experts / shape.experts,
            token_s=shape.flops_per_token / (profile.flops * share.matmul),
            kv_s=shape.kv_bytes_per_token / (profile.memory_rate * share.kv),
            pair_s=shape.flops_per_pair / (profile.flops * share.attention),
            decode_s=share.decode_s,
            step_s=share.step_s,
            pieces_s=share.pieces_s,
            eager_s=share.eager_s,
            captured=share.captured,
        )

    def terms(self, load: StepLoad) -> tuple[float, ...]:
        """W, F, K, A, D, O, P and E of a load, seconds, as the seed has them."""
        has_chunks, is_captured = load.tokens > load.decodes, load.tokens <= self.captured
        return (
            self.dense_s + self.expert_s * (1.0 - self.idle_share**load.tokens),
            self.token_s * load.tokens,
            self.kv_s * load.kv_read,
            self.pair_s * load.pairs,
            self.decode_s * load.decodes,
            self.step_s,
            self.pieces_s if has_chunks and is_captured else 0.0,
            self.eager_s if has_chunks and not is_captured else 0.0,
        )

    def seconds(self, load: StepLoad) -> float:
        """The step time with all factors 1."""
        weights, matmul, *others = self.terms(load)
        return max(weights, matmul) + sum(others)


class CostError(NamedTuple):
    """Relative errors |predicted - took| / took of the last `steps` predictions, each made before its step was seen."""

    median: float
    p90: float
    steps: int


class StepCost:
    """Predicts step times, and learns from them."""

    def __init__(self, rates: StepRates, *, forgetting: float = FORGETTING) -> None:
        if not 0.0 < forgetting <= 1.0:
            raise ValueError(f"forgetting={forgetting} must be above 0 and at most 1")
        self.rates = rates
        least = max(rates.pieces_s, LAUNCH_S), max(rates.eager_s, LAUNCH_S)
        self._measure = rates._replace(pieces_s=least[0], eager_s=least[1])  # what the factors are times of
        self._prior = np.array([1.0] * 6 + [rates.pieces_s / least[0], rates.eager_s / least[1]])
        self.factors = self._prior.copy()
        self._known_factors: list[float] = self.factors.tolist()
        self._forgetting = forgetting
        self._information = np.zeros((len(FACTORS), len(FACTORS)))
        self._moment = np.zeros(len(FACTORS))
        self._errors: deque[float] = deque(maxlen=WINDOW)
        self._scale = LEAST_OUTLIER
        # Steps not in the sums yet: terms, 1 / predicted, took / predicted, weight.
        self._seen: list[tuple[list[float], float, float, float]] = []
        self._strays: list[float] = []  # took / predicted of the last outliers, as long as they come one after another

    def units(self) -> UnitCosts:
        """What each unit of a step's load costs by now."""
        rates, factors = self._measure, self.factors.tolist()
        return UnitCosts(
            (rates.dense_s + rates.expert_s) * factors[0],
            rates.token_s * factors[1],
            rates.kv_s * factors[2],
            rates.pair_s * factors[3],
            rates.decode_s * factors[4],
            rates.step_s * factors[5],
            rates.pieces_s * factors[6],
            rates.eager_s * factors[7],
            rates.captured,
        )

    def seconds(self, load: StepLoad) -> float:
        """How long a step of this load will take."""
        return self._predicted(self._row(load))

    def observe(self, load: StepLoad, elapsed: float) -> None:
        """A step of this load took `elapsed` seconds. Times that are not finite and above 0 are ignored."""
        if not 0.0 < elapsed < math.inf:
            return
        row = self._row(load)
        predicted = max(self._predicted(row), 1e-9)
        error = abs(elapsed - predicted)
        self._errors.append(error / elapsed)
        weight = self._weight(error / predicted)
        if self._has_changed(elapsed / predicted, weight < 1.0):
            return
        self._seen.append((row, 1.0 / predicted, elapsed / predicted, weight))
        if len(self._errors) < SOLVE_EVERY or len(self._seen) >= SOLVE_EVERY:
            self._take_in()
            self.factors = self._solve()
            self._known_factors = self.factors.tolist()

    def _has_changed(self, ratio: float, is_outlier: bool) -> bool:
        """Whether with this step the machine is seen to have become slower or quicker; it is learnt anew then."""
        strays = self._strays
        if strays and (not is_outlier or (ratio > 1.0) is not (strays[-1] > 1.0)):
            strays.clear()
        if not is_outlier:
            return False
        strays.append(ratio)
        if len(strays) < CHANGED or len(self._errors) < SETTLED:
            return False
        times = statistics.median(strays)
        self._seen.clear()  # most of it these very steps
        strays.clear()
        self._moment = self._moment * times
        self._prior = self._prior * times
        self.factors = self._solve()
        self._known_factors = self.factors.tolist()
        return True

    def error(self) -> CostError:
        """How far off the last predictions were; zeros before the first."""
        if not self._errors:
            return CostError(0.0, 0.0, 0)
        median, p90 = np.quantile(np.array(self._errors), (0.5, 0.9))
        return CostError(float(median), float(p90), len(self._errors))

    def _row(self, load: StepLoad) -> list[float]:
        """The terms, with only the larger of weights and matmul in. Few numbers, at every step: no array."""
        row, factors = list(self._measure.terms(load)), self._known_factors
        row[1 if row[0] * factors[0] >= row[1] * factors[1] else 0] = 0.0
        return row

    def _predicted(self, row: list[float]) -> float:
        return sum(map(mul, row, self._known_factors))

    def _take_in(self) -> None:
        """What was seen since the last solution, each step forgotten a little for each that came after it."""
        rows, scales, times, weights = (np.array(column) for column in zip(*self._seen, strict=True))
        x = rows * scales[:, None]
        counts = weights * self._forgetting ** np.arange(len(x) - 1, -1, -1)
        kept = self._forgetting ** len(x)
        self._information = kept * self._information + (x.T * counts) @ x
        self._moment = kept * self._moment + x.T @ (counts * times)
        self._seen.clear()

    def _weight(self, error: float) -> float:
        """Huber's. The scale follows the median error: up a little for each above it, down for each below."""
        bound = OUTLIER * self._scale
        self._scale = max(LEAST_OUTLIER, self._scale * (1.05 if error > self._scale else 1 / 1.05))
        return 1.0 if error <= bound else bound / error

    def _solve(self) -> np.ndarray:
        """Least squares with no factor below 0: what would be negative is held at 0 and the others solved again."""
        matrix, moment = self._information + RIDGE, self._moment + PRIOR * self._prior
        factors = np.linalg.solve(matrix, moment)
        while not (factors >= 0.0).all():
            free = np.flatnonzero(factors > 0.0)
            factors = np.zeros(len(FACTORS))
            factors[free] = np.linalg.solve(matrix[np.ix_(free, free)], moment[free])
        return factors
