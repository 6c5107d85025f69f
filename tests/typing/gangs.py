"""What a type checker knows of gangs. Each line that ends with "# error" is one that mypy must refuse."""

from __future__ import annotations

from typing import Any, assert_type

from actors import Actor, Gang, GroupHandle, Handle, Handles, Role, TensorRef
from collective import Layout


class Trainer(Actor):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    async def fit(self, steps: int) -> float:
        return float(steps)


async def use(gang: Gang) -> None:
    trainer = Role("trainer", Trainer, 2, args=(3,))
    assert_type(trainer, Role[Trainer])
    async with Gang(trainer, Role("other", Trainer)) as gang:
        assert_type(gang, Gang)
        assert_type(gang[trainer], Handles[Trainer])
        assert_type(gang[trainer][0], Handle[Trainer])
        assert_type(gang["trainer"], Handles[Any])
        assert_type(await gang[trainer].call(Trainer.fit, 100), list[float])
        await gang[trainer].call(Trainer.fit, "100")  # error
        gang[0]  # error
        assert_type(gang.groups["dp"], GroupHandle)
        refs: list[TensorRef] = []
        assert_type(await gang.groups["dp"].allreduce(refs), list[TensorRef])
        rows = Layout((4, 4), 2, 1)
        assert_type(await gang.groups["dp"].repartition([None, *refs], rows, rows), list[TensorRef | None])
        await gang.groups["dp"].allreduce([3])  # error
        await gang.groups["dp"].allgather([None])  # error
    Role("trainer", int, 2)  # error
    Role("trainer", Trainer, 2, (3,))  # error
    Gang("trainer")  # error
