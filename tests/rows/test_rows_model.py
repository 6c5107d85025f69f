"""The bookkeeping of row streams, without any stream: who gets which row, whatever is announced when."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from collective._rows.ledger import Ledger, Round, furthest, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collective._rows.ledger import Order, Positions, Tail

Row = tuple[int, int]
"""A producer and the number of its row."""
randoms = st.integers(0, 1 << 32).map(Random)
thousands = settings(max_examples=1000, deadline=None)


@dataclass
class Consumer:
    """What a consumer does with its ledger: plan at any time, give out in the order of planning."""

    ledger: Ledger
    batch: int
    planned: list[Round] = field(default_factory=list)
    given: list[Round] = field(default_factory=list)
    at: list[int] = field(default_factory=list)

    def plan(self) -> None:
        step = self.ledger.next_round()
        if step is not None:
            self.planned.append(step)

    def give(self, end: Positions | None = None) -> None:
        while self.planned:
            step = self.planned.pop(0)
            if end is None or step.within(end):
                self.given.append(step)
                for producer, position in step.moves.items():
                    self.at[producer] = max(self.at[producer], position)
                return

    def rows(self) -> list[list[Row]]:
        return [self.places(step) for step in self.given]

    def places(self, step: Round) -> list[Row]:
        """Lay a round's runs out, each place once."""
        places: list[Row | None] = [None] * step.rows
        for run in step.runs:
            for index in range(run.rows):
                place = run.at + index * run.stride
                assert places[place] is None
                places[place] = (run.producer, run.first + index)
        for producer, (first, end) in step.wanted().items():
            assert sorted(row for p, row in places if p == producer) == list(range(first, end))
        assert None not in places
        return places


@dataclass
class Job:
    """Producers' row counts, consumers, and rows a batch."""

    counts: list[int]
    consumers: int
    batch: int
    order: Order = "round-robin"
    tail: Tail = "drop"

    def start(self, positions: Sequence[int] | None = None, origins: Sequence[int] | None = None) -> list[Consumer]:
        positions = positions or [0] * len(self.counts)
        return [
            Consumer(
                Ledger(
                    positions,
                    origins or [0] * len(self.counts),
                    consumers=self.consumers,
                    batch=self.batch,
                    me=me,
                    order=self.order,
                    tail=self.tail,
                ),
                self.batch,
                at=list(positions),
            )
            for me in range(self.consumers)
        ]

    def expected(self) -> list[Row]:
        """The order, by the book: the first row of each producer, then the second of each, and so on."""
        return sorted(((p, r) for p, n in enumerate(self.counts) for r in range(n)), key=lambda row: row[::-1])


jobs = st.builds(
    Job,
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    consumers=st.integers(1, 4),
    batch=st.integers(1, 6),
    order=st.sampled_from(["round-robin", "arrival"]),
    tail=st.sampled_from(["drop", "pad"]),
)


def run(job: Job, consumers: list[Consumer], random: Random, *, steps: int = 10_000) -> None:
    """Announce blocks of any size to each consumer at any time, in order; stop early after some steps."""
    blocks = [cuts(count, at, random) for count, at in zip(job.counts, consumers[0].at, strict=True)]
    queues = [
        [[(producer, end, end == job.counts[producer]) for end in ends] for producer, ends in enumerate(blocks)]
        for _ in consumers
    ]
    while steps:
        steps -= 1
        number = random.randrange(len(consumers))
        consumer, queue = consumers[number], [each for each in queues[number] if each]
        if queue and random.random() < 0.5:
            producer, end, closed = random.choice(queue).pop(0)
            consumer.ledger.announce(producer, end, closed=closed)
        elif random.random() < 0.5:
            consumer.plan()
        else:
            consumer.give()
        if all(done(each) for each in consumers):
            return


def in_order(consumers: list[Consumer]) -> list[Row]:
    rounds = zip(*(consumer.rows() for consumer in consumers), strict=True)
    return [row for batches in rounds for batch in batches for row in batch]


def done(consumer: Consumer) -> bool:
    return not consumer.planned and consumer.ledger.exhausted()


def cuts(count: int, at: int, random: Random) -> list[int]:
    """Cut a producer's rows into blocks; the last one closes."""
    return sorted({random.randint(at, count) for _ in range(random.randint(0, 5))} | {count})


@thousands
@given(job=jobs, random=randoms)
def test_every_row_goes_to_one_consumer_and_all_get_as_many_batches(job: Job, random: Random) -> None:
    consumers = job.start()
    run(job, consumers, random)
    assert all(map(done, consumers))
    rounds = {len(consumer.given) for consumer in consumers}
    total, size = sum(job.counts), job.consumers * job.batch
    assert rounds == {-(-total // size) if job.tail == "pad" else total // size}
    rows = [row for consumer in consumers for batch in consumer.rows() for row in batch]
    assert len(set(rows)) == len(rows) == (total if job.tail == "pad" else total - total % size)
    assert {consumer.ledger.left for consumer in consumers} == {total - len(rows)}
    if job.order == "round-robin":
        assert in_order(consumers) == job.expected()[: len(rows)]
    else:
        for consumer in consumers:  # each producer's rows stay in their order
            for producer in range(len(job.counts)):
                own = [r for batch in consumer.rows() for p, r in batch if p == producer]
                assert own == sorted(own)


@thousands
@given(job=jobs, random=randoms, stop=st.integers(0, 60), again=st.tuples(st.integers(1, 4), st.integers(1, 6)))
def test_a_leaver_ends_it_at_one_round_and_another_job_goes_on(
    job: Job, random: Random, stop: int, again: tuple[int, int]
) -> None:
    consumers = job.start()
    run(job, consumers, random, steps=stop)
    leaver = random.randrange(job.consumers)
    end = furthest([tuple(consumer.at) for consumer in consumers])
    state = nearest([tuple(consumer.at) for consumer in consumers])
    stayers = [consumer for number, consumer in enumerate(consumers) if number != leaver]
    for consumer in stayers:
        for producer, count in enumerate(job.counts):  # what is on its way comes in the end
            if consumer.ledger.ends[producer] < count or consumer.ledger.open:
                consumer.ledger.announce(producer, count, closed=True)
        consumer.ledger.cut(end)
        while not done(consumer):
            consumer.plan()
            consumer.give(end)
        assert tuple(consumer.at) == end
    assert len({len(consumer.given) for consumer in stayers}) <= 1

    second = Job(job.counts, *again, order=job.order, tail="pad")
    origins = [0] * len(job.counts) if job.order == "round-robin" else state
    others = second.start(state, origins)
    run(second, others, random)
    rows = [row for consumer in others for batch in consumer.rows() for row in batch]
    before = {(p, r) for p, at in enumerate(state) for r in range(at)}
    assert len(rows) == len(set(rows))
    assert before | set(rows) == set(job.expected())
    assert not before & set(rows)
    done_rows = {row for consumer in consumers for batch in consumer.rows() for row in batch}
    assert before <= done_rows
    if job.order == "round-robin":
        assert in_order(others) == job.expected()[sum(state) :]


@given(job=jobs, random=randoms)
def test_a_round_waits_for_all_its_rows_and_for_nothing_else(job: Job, random: Random) -> None:
    job.order = "round-robin"
    [consumer, *_] = job.start()
    ends = [random.randint(0, count) for count in job.counts]
    closed = [random.random() < 0.5 for _ in ends]
    for producer, (end, last) in enumerate(zip(ends, closed, strict=True)):
        consumer.ledger.announce(producer, end, closed=last)
    missing = min(((ends[p], p) for p, last in enumerate(closed) if not last), default=(100, 0))
    determined = sum((row, p) < missing for p, row in Job(ends, 1, 1).expected())
    rounds = 0
    while consumer.ledger.next_round() is not None:
        rounds += 1
    exact, left = divmod(determined, job.consumers * job.batch)
    assert rounds == exact + (job.tail == "pad" and all(closed) and left > 0)
