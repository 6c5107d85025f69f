"""Two groups in one actor: learners average their weights among themselves, then hand them to the players.

Both groups are declared with the gang. A learner is a member of both, each with ranks of its own; their operations
are ordered within a group and independent between groups.
"""

import argparse
import asyncio

import numpy as np

from actors import Actor, Gang, Role
from collective import GroupSpec, ReduceOp
from scheduling import Resources


class Learner(Actor):
    async def improve(self, rounds: int) -> list[int]:
        learners, everyone = self.groups["learners"], self.groups["everyone"]
        root = everyone.ranks("learner")[0]
        weights = np.zeros(4, np.float32)
        for _ in range(rounds):
            weights = await learners.allreduce(weights + learners.rank + 1, ReduceOp.AVG)
            await everyone.broadcast(weights if everyone.rank == root else None, root)
        return [learners.rank, everyone.rank]


class Player(Actor):
    async def play(self, rounds: int) -> list[float]:
        everyone = self.groups["everyone"]
        root = everyone.ranks("learner")[0]
        seen = []
        for _ in range(rounds):
            weights = await everyone.broadcast(None, root)
            seen.append(float(weights[0]))
        return seen


async def main(runtime: str) -> None:
    async with Gang(
        Role("player", Player, 2, resources=Resources(cpu=0.4)),
        Role("learner", Learner, 2, resources=Resources(cpu=0.4)),
        groups=[
            GroupSpec("learners", roles=("learner",)),
            GroupSpec("everyone", roles=("player", "learner")),
        ],
        runtime=runtime,
    ) as gang:
        async with asyncio.TaskGroup() as tasks:
            improve = tasks.create_task(gang["learner"].improve(3))
            play = tasks.create_task(gang["player"].play(3))
        for learner, (inner, outer) in enumerate(improve.result()):
            print(f"learner[{learner}] is rank {inner} of 'learners' and rank {outer} of 'everyone'")
        for player, seen in enumerate(play.result()):
            print(f"player[{player}] was given weights of {seen}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runtime", choices=("ray", "inproc"), default="ray")
    asyncio.run(main(parser.parse_args().runtime))
