"""A gang of three actors in one group, and what they pull together."""

import argparse
import asyncio

import numpy as np

from actors import Actor, Gang, Role
from collective import GroupSpec
from scheduling import Resources


class Dog(Actor):
    async def pull(self, force: float) -> np.ndarray:
        return await self.groups["team"].allreduce(np.array([force, self.rank]))


async def main(runtime: str) -> None:
    team = Role("dog", Dog, 3, resources=Resources(cpu=0.5))
    async with Gang(team, groups=[GroupSpec("team", roles=("dog",))], runtime=runtime) as gang:
        for rank, total in enumerate(await gang["dog"].pull(2.5)):
            print(f"dog[{rank}] feels {total[0]} pulled by all, ranks add up to {total[1]:.0f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runtime", choices=("ray", "inproc"), default="ray")
    asyncio.run(main(parser.parse_args().runtime))
