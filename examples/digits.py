"""Train on the UCI handwritten digits: N readers feed M data-parallel trainers with a sharded optimizer.

The readers own slices of different sizes (with four: 10, 20, 30 and 40 % of the training set). They shuffle them
anew for every epoch and put them into a RowStream, which deals them out in batches straight to the trainers, with no
node in the middle: as many to each, whatever the slices' sizes. The order of its rows is a function of these sizes
alone, so that `reference` can train one process on the very same batches.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from actors import Actor, Gang, Role
from collective import GroupSpec, ReduceOp, RowStream
from scheduling import Resources

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from collective import Group

PIXELS, HIDDEN, CLASSES = 64, 64, 10
SHAPES = ((PIXELS, HIDDEN), (HIDDEN,), (HIDDEN, CLASSES), (CLASSES,))
RATE, MOMENTUM = 0.07, 0.9
BLOCK = 50
"""Rows that a reader puts at a time."""


@dataclass(frozen=True)
class Progress:
    """How far a trainer has come.

    :param epoch: how many epochs it has finished.
    :param loss: the mean over its batches of the epoch so far.
    """

    step: int
    steps: int
    epoch: int
    loss: float


@dataclass(frozen=True)
class Replica:
    """What one trainer has to show at the end."""

    weights: np.ndarray
    batches: int
    rows: int


@dataclass(frozen=True)
class Result:
    """:param seconds: what the training took, without starting and stopping the gang."""

    trainers: tuple[Replica, ...]
    accuracy: float
    seconds: float

    @property
    def rows_per_second(self) -> float:
        return sum(trainer.rows for trainer in self.trainers) / self.seconds


# The data


def load() -> tuple[np.ndarray, np.ndarray]:
    """Return the training and the test rows (every fifth): uint8, 64 pixels from 0 to 16, then the label."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    rows = np.column_stack([pixels, labels]).astype(np.uint8)
    testing = np.arange(len(rows)) % 5 == 0
    return rows[~testing], rows[testing]


def cut(rows: np.ndarray, readers: int) -> list[np.ndarray]:
    """Cut the training set into one slice a reader, of which the i-th is i times as long as the first."""
    shares = np.arange(readers + 1).cumsum()
    return np.split(rows, (shares[1:-1] * len(rows)) // shares[-1])


def count_steps(owned: Sequence[int], trainers: int, batch: int) -> int:
    """Return how many rounds of a batch for each trainer an epoch has. What is left over is other rows in each."""
    steps = sum(owned) // (trainers * batch)
    if steps == 0:
        raise ValueError(f"{sum(owned)} rows do not fill one round of {trainers} trainers x {batch} rows")
    return steps


def shuffled(rows: np.ndarray, seed: int, epoch: int, reader: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch, reader)).permutation(rows)


# The model: one hidden layer, its weights in one flat float32 vector


def initial_weights(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    layers = [rng.normal(0, shape[0] ** -0.5, shape) if len(shape) == 2 else np.zeros(shape) for shape in SHAPES]
    return np.concatenate([layer.ravel() for layer in layers]).astype(np.float32)


def layers(weights: np.ndarray) -> list[np.ndarray]:
    ends = np.cumsum([np.prod(shape) for shape in SHAPES])
    return [flat.reshape(shape) for flat, shape in zip(np.split(weights, ends[:-1]), SHAPES, strict=True)]


def forward(weights: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    w1, b1, w2, b2 = layers(weights)
    inputs = rows[:, :PIXELS].astype(np.float32) / 16
    hidden = np.tanh(inputs @ w1 + b1)
    scores = np.exp(hidden @ w2 + b2)
    return inputs, hidden, scores / scores.sum(axis=1, keepdims=True)


def gradient(weights: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the gradient of the mean cross-entropy over `rows`, flat as the weights are, and the mean itself."""
    inputs, hidden, guess = forward(weights, rows)
    places = np.arange(len(rows)), rows[:, PIXELS]
    loss = float(-np.log(guess[places]).mean())
    guess[places] -= 1
    back = guess / np.float32(len(rows))
    inner = (back @ layers(weights)[2].T) * (1 - hidden**2)
    parts = (inputs.T @ inner, inner.sum(axis=0), hidden.T @ back, back.sum(axis=0))
    return np.concatenate([part.ravel() for part in parts]), loss


def accuracy(weights: np.ndarray, rows: np.ndarray) -> float:
    return float((forward(weights, rows)[2].argmax(axis=1) == rows[:, PIXELS]).mean())


def descend(weights: np.ndarray, velocity: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Return the next weights by gradient descent with momentum; changes `velocity`, the optimizer's state."""
    velocity *= MOMENTUM
    velocity += slope
    return weights - np.float32(RATE) * velocity


# The actors


def epoch_stream(feed: Group, batch: int) -> RowStream:
    """Make the stream of one epoch; every reader and every trainer does."""
    return RowStream(feed, producers="reader", consumers="trainer", batch_size=batch, tail="drop")


class Reader(Actor):
    def __init__(self, batch: int, seed: int) -> None:
        self.batch, self.seed = batch, seed

    async def own(self, rows: np.ndarray) -> None:
        self.rows = rows

    async def feed(self, epochs: int) -> None:
        """Put this reader's rows into a stream for each epoch, in blocks as a file would give them."""
        for epoch in range(epochs):
            rows = shuffled(self.rows, self.seed, epoch, self.rank)
            async with epoch_stream(self.groups["feed"], self.batch) as stream:
                for start in range(0, len(rows), BLOCK):
                    await stream.put({"rows": rows[start : start + BLOCK]})


class Trainer(Actor):
    def __init__(self, batch: int, seed: int) -> None:
        self.batch = batch
        self.weights = initial_weights(seed)
        self.progress = Progress(0, 0, 0, 0.0)
        self.moved = asyncio.Event()

    async def fit(self, epochs: int, steps: int) -> Replica:
        """Train for some epochs, of so many steps each."""
        dp = self.groups["dp"]
        splits = [len(part) for part in np.array_split(self.weights, dp.size)]
        velocity = np.zeros(splits[dp.rank], np.float32)
        rows = 0
        losses: list[float] = []
        async for batch in self.batches(epochs):
            slope, loss = gradient(self.weights, batch)
            shard = await dp.reduce_scatter(slope, ReduceOp.AVG, splits=splits)
            mine = np.array_split(self.weights, dp.size)[dp.rank]
            self.weights = await dp.allgather(descend(mine, velocity, shard))
            rows += len(batch)
            losses.append(loss)
            step = len(losses)
            mean = float(np.mean(losses[(step - 1) // steps * steps :]))
            self.progress = Progress(step, epochs * steps, step // steps, mean)
            self.moved.set()
        return Replica(self.weights, len(losses), rows)

    async def batches(self, epochs: int) -> AsyncIterator[np.ndarray]:
        """Take this trainer's batches of one epoch after the other."""
        for _ in range(epochs):
            async with epoch_stream(self.groups["feed"], self.batch) as stream:
                async for batch in stream:
                    yield batch["rows"]

    async def watch(self) -> AsyncIterator[Progress]:
        """Stream how far `fit` has come: the latest news whenever the caller is ready for more."""
        while not self.progress.steps or self.progress.step < self.progress.steps:
            await self.moved.wait()
            self.moved.clear()
            yield self.progress


# The job


async def train(
    *,
    readers: int = 4,
    trainers: int = 2,
    epochs: int = 20,
    runtime: str = "ray",
    backend: str = "auto",
    batch: int = 16,
    seed: int = 0,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Result:
    """Train on `readers` x `trainers` actors; `batch` is rows a trainer and step."""
    training, testing = load()
    slices = cut(training, readers)
    steps = count_steps([len(rows) for rows in slices], trainers, batch)
    async with Gang(
        Role("reader", Reader, readers, args=(batch, seed), resources=Resources(cpu=0.1)),
        Role("trainer", Trainer, trainers, args=(batch, seed), resources=Resources(cpu=0.2)),
        groups=[
            GroupSpec("feed", roles=("reader", "trainer"), backend=backend),
            GroupSpec("dp", roles=("trainer",), backend=backend),
        ],
        runtime=runtime,
    ) as gang:
        await gang["reader"].own.map(slices)
        started = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(gang["reader"].feed(epochs))
            fit = tasks.create_task(gang["trainer"].fit(epochs, steps))
            async with gang["trainer"][0].watch() as news:
                async for progress in news:
                    report(progress)
        seconds = time.perf_counter() - started
    replicas = tuple(fit.result())
    return Result(replicas, accuracy(replicas[0].weights, testing), seconds)


def reference(*, readers: int, trainers: int, epochs: int, batch: int = 16, seed: int = 0) -> np.ndarray:
    """Return the weights that one process gets from the same global batches: same model, none of the machinery."""
    slices = cut(load()[0], readers)
    steps = count_steps([len(rows) for rows in slices], trainers, batch)
    # The first row of each reader, then the second of each that has one, and so on.
    turns = np.concatenate([np.arange(len(rows)) for rows in slices])
    owners = np.repeat(np.arange(readers), [len(rows) for rows in slices])
    order = np.lexsort((owners, turns))[: steps * trainers * batch]
    weights = initial_weights(seed)
    velocity = np.zeros_like(weights)
    for epoch in range(epochs):
        rows = np.concatenate([shuffled(part, seed, epoch, reader) for reader, part in enumerate(slices)])
        for step in rows[order].reshape(steps, trainers * batch, PIXELS + 1):
            weights = descend(weights, velocity, gradient(weights, step)[0])
    return weights


class Display:
    """A progress bar on a terminal; elsewhere a line for each epoch."""

    def __init__(self, epochs: int) -> None:
        self.epochs, self.epoch, self.bar = epochs, 0, sys.stdout.isatty()

    def __call__(self, progress: Progress) -> None:
        text = f"epoch {progress.epoch}/{self.epochs}  loss {progress.loss:.4f}"
        if self.bar:
            done = 40 * progress.step // progress.steps
            print(f"\r[{'#' * done:.<40}] {text}", end="\n" if done == 40 else "", flush=True)
        elif progress.epoch > self.epoch:
            print(text, flush=True)
        self.epoch = progress.epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readers", type=int, default=4)
    parser.add_argument("--trainers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--runtime", choices=("ray", "inproc"), default="ray")
    parser.add_argument("--backend", default="auto", help="of the groups: auto, shm, gloo or memory")
    parser.add_argument("--batch", type=int, default=16, help="rows a trainer and step")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    for name in ("readers", "trainers", "epochs", "batch"):
        if options[name] < 1:
            parser.error(f"--{name} is {options[name]}; it must be at least 1")

    print(f"{options['readers']} readers feed {options['trainers']} trainers on {options['runtime']}", flush=True)
    result = asyncio.run(train(**options, report=Display(options["epochs"])))
    print(f"test accuracy  {result.accuracy:.4f}")
    for rank, trainer in enumerate(result.trainers):
        print(f"trainer[{rank}]     {trainer.rows} rows in {trainer.batches} batches of {options['batch']}")
    print(f"throughput     {result.rows_per_second:,.0f} rows/s in {result.seconds:.2f} s of training")


if __name__ == "__main__":
    main()
