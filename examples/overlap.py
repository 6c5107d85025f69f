"""Overlap two collectives with each other and with work.

An operation takes its place and starts when it is called; awaiting it comes later.
"""

import argparse
import asyncio

import numpy as np

from actors import Actor, Gang, Role
from collective import GroupSpec, ReduceOp
from scheduling import Resources


class Worker(Actor):
    async def step(self) -> tuple[float, float]:
        """Average the gradients of two layers, the last layer's while the first layer's is still being computed."""
        dp = self.groups["dp"]
        last = dp.allreduce(self.gradient(layer=1), ReduceOp.AVG)
        gradient = await asyncio.to_thread(self.gradient, layer=0)  # meanwhile the first collective moves on
        first = dp.allreduce(gradient, ReduceOp.AVG)
        # Await them in any order: the group runs them in the order of the calls.
        return float((await first).mean()), float((await last).mean())

    def gradient(self, layer: int) -> np.ndarray:
        return np.full((256, 256), 10 * layer + self.rank, np.float32)


async def main(runtime: str) -> None:
    workers = Role("worker", Worker, 3, resources=Resources(cpu=0.5))
    async with Gang(workers, groups=[GroupSpec("dp", roles=("worker",))], runtime=runtime) as gang:
        for rank, (first, last) in enumerate(await gang["worker"].step()):
            print(f"worker[{rank}] averaged layer 0 to {first} and layer 1 to {last}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runtime", choices=("ray", "inproc"), default="ray")
    asyncio.run(main(parser.parse_args().runtime))
