"""numpy and torch members in one group: each gets back the kind of array that it passed."""

import argparse
import asyncio

import numpy as np

from actors import Actor, Gang, Role
from collective import GroupSpec
from scheduling import Resources


class Counter(Actor):
    """Works with numpy."""

    async def run(self) -> list[str]:
        mixed = self.groups["mixed"]
        total = await mixed.allreduce(np.array([1.0, 2.0], np.float32))
        given = await mixed.broadcast(None, mixed.ranks("model")[0])  # it passed nothing, so it gets the sender's kind
        return [f"{type(total).__module__} {total.tolist()}", f"{type(given).__module__} {given.tolist()}"]


class Model(Actor):
    """Works with torch."""

    async def run(self) -> list[str]:
        import torch

        mixed = self.groups["mixed"]
        total = await mixed.allreduce(torch.tensor([10.0, 20.0]))
        given = await mixed.broadcast(torch.arange(3), mixed.ranks("model")[0])
        return [f"{type(total).__module__} {total.tolist()}", f"{type(given).__module__} {given.tolist()}"]


async def main(runtime: str) -> None:
    async with Gang(
        Role("counter", Counter, 1, resources=Resources(cpu=0.5)),
        Role("model", Model, 1, resources=Resources(cpu=0.5)),
        groups=[GroupSpec("mixed", roles=("counter", "model"))],
        runtime=runtime,
    ) as gang:
        async with asyncio.TaskGroup() as tasks:
            runs = {role: tasks.create_task(gang[role].run()) for role in ("counter", "model")}
        for role, run in runs.items():
            total, given = run.result()[0]
            print(f"{role}: allreduce gave {total}, broadcast gave {given}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runtime", choices=("ray", "inproc"), default="ray")
    asyncio.run(main(parser.parse_args().runtime))
