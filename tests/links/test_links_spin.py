"""When a link over shared memory spins and when it sleeps, by a clock that the tests turn."""

import itertools

import pytest

from collective._links import outlook as outlook_module
from collective._links import poller as poller_module
from collective._links.outlook import Outlook
from collective._links.poller import BUDGET, Poller


class Clock:
    """Stands for time; giving way takes `others` of it, a look takes a microsecond."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1.0
        self.others = 0.0
        monkeypatch.setattr(poller_module, "perf_counter", self.read)
        monkeypatch.setattr(outlook_module, "perf_counter", self.read)
        monkeypatch.setattr(poller_module, "sched_yield", self.give_way)

    def read(self) -> float:
        self.now += 0.5e-6
        return self.now

    def give_way(self) -> None:
        self.now += 0.5e-6 + self.others


class Loop:
    """Runs what was scheduled, turn by turn."""

    def __init__(self) -> None:
        self.ready = []

    def call_soon(self, callback) -> None:
        self.ready.append(callback)

    def turn(self) -> bool:
        ready, self.ready = self.ready, []
        for callback in ready:
            callback()
        return bool(ready)


class QuietLink:
    """A link on which nothing comes."""

    def __init__(self) -> None:
        self.awake = False
        self.outlook = Outlook(possible=True)

    def poll(self) -> bool:
        return False

    def stirred(self) -> bool:
        return False

    def say_asleep(self) -> None: ...
    def say_awake(self) -> None: ...


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def spin(poller: Poller, loop: Loop, link: QuietLink, clock: Clock) -> float:
    """Have the link expect something; return how long it stayed awake."""
    link.outlook.sent = True
    began = clock.now
    poller.expect(link)
    while loop.turn():
        assert clock.now - began < 1.0
    assert not link.awake
    return clock.now - began if clock.now - began > 2e-6 else 0.0


def test_spinning_ends_with_its_budget(clock: Clock) -> None:
    loop, link = Loop(), QuietLink()
    assert spin(Poller(loop), loop, link, clock) == pytest.approx(BUDGET, rel=0.2)


def test_what_others_take_is_not_counted(clock: Clock) -> None:
    loop, link = Loop(), QuietLink()
    clock.others = 100e-6
    assert spin(Poller(loop), loop, link, clock) > 10 * BUDGET


def test_tries_that_are_lost_end_the_spinning(clock: Clock) -> None:
    loop, link = Loop(), QuietLink()
    poller = Poller(loop)
    tries = [bool(spin(poller, loop, link, clock)) for _ in range(100)]
    assert tries[0]
    assert not any(tries[5:])


@pytest.mark.parametrize(("pause", "again"), [(0.5e-3, True), (50e-3, False)])
def test_messages_that_come_soon_bring_it_back(clock: Clock, pause: float, again: bool) -> None:
    loop, link = Loop(), QuietLink()
    poller = Poller(loop)
    while spin(poller, loop, link, clock):
        pass
    tries = []
    for _ in range(100):
        clock.now += pause
        link.outlook.woken()
        tries.append(bool(spin(poller, loop, link, clock)))
    assert any(tries) == again
    assert sum(tries[50:]) < 5  # They are lost again, and become rare.


def test_it_rests_where_others_compute(clock: Clock) -> None:
    loop = Loop()
    poller = Poller(loop)
    clock.others = 3e-3
    tries = []
    while clock.now < 5.0:
        began = clock.now
        if spin(poller, loop, QuietLink(), clock):
            assert clock.now - began < 4e-3  # Giving way once is enough to see it.
            tries.append(began)
        clock.now += 0.1e-3
    rests = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert rests[0] < 6e-3
    assert 0.1 < rests[-1] < 0.2
    clock.others = 0.0
    clock.now += 10.0
    assert spin(poller, loop, QuietLink(), clock)
