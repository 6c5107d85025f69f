"""Train a sharded model and serve it sharded otherwise: servers take new weights after each step, and training goes on.

Four trainers share a network for handwritten digits, each with a quarter of its hidden units; two servers have it cut
another way. After each step the trainers hand a snapshot over by one `repartition`, and compute the next meanwhile. The
step's number and a checksum travel along: a server that got parts of two steps would see it.
"""

import argparse
import asyncio
import time

import torch
from sklearn.datasets import load_digits

from actors import Actor, Gang, Role
from collective import GroupSpec, Layout, Replicate, Shard
from scheduling import Resources

TRAINERS, SERVERS, STEPS = 4, 2, 10
ROWS, COLUMNS, ALL = Shard(0), Shard(1), Replicate()


def layouts(width):
    """Return how trainers hold each tensor, and how servers do."""
    table = {
        "first.weight": ((width, 64), ROWS, ALL),
        "first.bias": ((width,), ROWS, ALL),
        "second.weight": ((width, width), COLUMNS, ROWS),
        "head.weight": ((10, width), ALL, COLUMNS),
        "head.bias": ((10,), ALL, ALL),
        "step": ((TRAINERS,), ROWS, ALL),
        "checksum": ((TRAINERS,), ROWS, ALL),
    }
    ranks = range(TRAINERS, TRAINERS + SERVERS)
    trained = {name: Layout(shape, TRAINERS, [placement]) for name, (shape, placement, _) in table.items()}
    return trained, {name: Layout(shape, SERVERS, [placement], ranks) for name, (shape, _, placement) in table.items()}


def checksum(weights, layout, rank):
    """Add up the bits of what only this rank has: the sum over ranks is the same in every layout."""
    own = [name for name in weights if layout[name].placements != (ALL,) or rank == layout[name].ranks[0]]
    return torch.stack([weights[name].view(torch.int32).sum(dtype=torch.int64) for name in own]).sum(0, keepdim=True)


class Member(Actor):
    def __init__(self, width: int) -> None:
        torch.set_num_threads(1)
        self.width = width
        self.trained, self.served = layouts(width)
        pixels, labels = map(torch.tensor, load_digits(return_X_y=True))
        self.training, self.testing = (torch.arange(len(labels)) % 5).nonzero().squeeze(), slice(None, None, 5)
        self.pixels, self.labels = pixels.float() / 16, labels

    async def race(self, rounds: int) -> list[float]:
        """Time how the large layer comes to the servers: by repartition, and by way of rank 0."""
        src, dst, everyone = self.trained["second.weight"], self.served["second.weight"], self.groups["everyone"]
        held = torch.ones(src.local_shape(self.rank)) if self.role == "trainer" else None

        async def by_way_of_rank_0() -> None:
            parts = await everyone.gather(torch.empty(0) if held is None else held, 0)
            whole = await everyone.broadcast(parts and torch.cat(parts[:TRAINERS], dim=1), 0)
            if held is None:
                dst.local(everyone.rank, whole).clone()

        times = []
        for way in (lambda: everyone.repartition(held, src, dst)), by_way_of_rank_0:
            await way()  # not timed: links open, memory is taken
            await everyone.barrier()
            begun = time.perf_counter()
            for _ in range(rounds):
                await way()
            await everyone.barrier()
            times.append((time.perf_counter() - begun) / rounds * 1e3)
        return times


class Trainer(Member):
    async def setup(self) -> None:
        torch.manual_seed(self.rank)
        first = torch.nn.Linear(64, self.width // TRAINERS)
        second = torch.nn.Linear(self.width // TRAINERS, self.width, bias=False)
        torch.manual_seed(TRAINERS)  # the head is the same on all
        self.model = torch.nn.ModuleDict({"first": first, "second": second, "head": torch.nn.Linear(self.width, 10)})
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)

    async def fit(self, steps: int) -> list[tuple[float, float, float]]:
        """Train; hand the weights over after each step. Return its loss, its seconds, and those of waiting."""
        told, handed_over = [], asyncio.sleep(0)
        snapshot = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        for step in range(steps):
            begun = time.perf_counter()
            loss = await self.train(step)
            computed = time.perf_counter()
            await handed_over  # the last snapshot, which may be written from now on
            waited = time.perf_counter() - computed
            for name, weight in self.model.state_dict().items():
                snapshot[name].copy_(weight)
            marks = {"step": torch.tensor([step]), "checksum": checksum(snapshot, self.trained, self.rank)}
            handed_over = self.groups["everyone"].repartition(snapshot | marks, self.trained, self.served)
            told.append((loss, time.perf_counter() - begun, waited))
        await handed_over
        return told

    async def train(self, step: int) -> float:
        """Do one step, the same rows on every trainer. What their parts of the hidden layer give is added up."""
        batch = self.training[torch.randperm(len(self.training), generator=torch.Generator().manual_seed(step))[:128]]
        first, second, head = self.model.values()
        part = await asyncio.to_thread(lambda: second(torch.relu(first(self.pixels[batch]))))
        total = (await self.groups["trainers"].allreduce(part.detach())).requires_grad_()
        loss = torch.nn.functional.cross_entropy(head(torch.relu(total)), self.labels[batch])
        self.optimizer.zero_grad()
        loss.backward()
        await asyncio.to_thread(part.backward, total.grad)
        self.optimizer.step()
        return loss.item()


class Server(Member):
    async def serve(self, steps: int) -> list[tuple[int, int, float]]:
        """Take the weights of each step; return its number, its checksum, and the share of right answers."""
        everyone, servers, told = self.groups["everyone"], self.groups["servers"], []
        for _ in range(steps):
            weights = await everyone.repartition(None, self.trained, self.served)
            numbers, promised = set(weights.pop("step").tolist()), int(weights.pop("checksum").sum())
            found = int(await servers.allreduce(checksum(weights, self.served, everyone.rank)))
            if len(numbers) > 1 or found != promised:
                raise RuntimeError(f"torn weights: of the steps {numbers}, with checksum {found} and not {promised}")
            hidden = torch.relu(self.pixels[self.testing] @ weights["first.weight"].T + weights["first.bias"])
            part = torch.relu(hidden @ weights["second.weight"].T) @ weights["head.weight"].T
            answers = (await servers.allreduce(part) + weights["head.bias"]).argmax(1)
            told.append((numbers.pop(), found, float((answers == self.labels[self.testing]).float().mean())))
        return told


async def main(width: int, runtime: str) -> None:
    trainers = Role("trainer", Trainer, TRAINERS, args=(width,), resources=Resources(cpu=0.25))
    servers = Role("server", Server, SERVERS, args=(width,), resources=Resources(cpu=0.25))
    members = [("everyone", ("trainer", "server")), ("trainers", ("trainer",)), ("servers", ("server",))]
    groups = [GroupSpec(*each) for each in members]
    async with Gang(trainers, servers, groups=groups, runtime=runtime) as gang:
        trained, served = await asyncio.gather(gang["trainer"].fit(STEPS), gang["server"].serve(STEPS))
        for (loss, seconds, waited), (step, whole, right) in zip(trained[0], served[0], strict=True):
            print(f"step {step}: loss {loss:.2f}, {seconds:.2f} s ({waited:.2f} waiting); ", end="")
            print(f"served whole ({whole & 0xFFFFFFFF:08x}), {right:.0%} right")
        (direct, around), *_ = (await asyncio.gather(gang["trainer"].race(5), gang["server"].race(5)))[0]
    print(f"{width * width * 4e-6:.1f} MB: {direct:.0f} ms by repartition, {around:.0f} ms by way of rank 0")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runtime", choices=("ray", "inproc"), default="ray")
    parser.add_argument("--width", type=int, default=4992, help="hidden units; 4992 make 100 MB of weights")
    options = parser.parse_args()
    asyncio.run(main(options.width, options.runtime))
