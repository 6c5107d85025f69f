"""Producers that add the shares of their blocks to Redis streams, and consumers that read them; processes both."""

from __future__ import annotations

import multiprocessing
import socket
import subprocess
import tempfile
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import redis

from benchmarks.side import warmth

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from benchmarks.side import Turns


def produce(client: redis.Redis, rank: int, consumers: int, nbytes: int, rounds: int) -> int:
    """Add a share for each consumer in every round, to a stream for each pair; one request a block."""
    for _ in range(rounds):
        shares = np.split(np.ones(nbytes, np.uint8), consumers)
        with client.pipeline(transaction=False) as pipeline:
            for number, share in enumerate(shares):
                pipeline.xadd(f"{rank}-{number}", {"rows": share.data})
            pipeline.execute()
    return 0


def consume(client: redis.Redis, rank: int, producers: int, rounds: int) -> int:
    """Put the shares of every producer together in every round."""
    keys = [f"{producer}-{rank}".encode() for producer in range(producers)]
    last: dict[Any, Any] = dict.fromkeys(keys, "0")
    waiting: dict[bytes, deque[bytes]] = {key: deque() for key in keys}
    total = 0
    for _ in range(rounds):
        while not all(waiting.values()):
            for key, entries in client.xread(last, count=8, block=0):
                last[key] = entries[-1][0]
                waiting[key].extend(entry[b"rows"] for _, entry in entries)
        batch = np.concatenate([np.frombuffer(waiting[key].popleft(), np.uint8) for key in keys])
        total += int(batch[0]) + batch.nbytes
    client.unlink(*keys)
    return total


def work(port: int, rank: int, producers: int, consumers: int, pipe: Connection) -> None:
    """Be a producer or a consumer."""
    client = redis.Redis(port=port)
    while (request := pipe.recv()) is not None:
        nbytes, rounds = request
        if rank < producers:
            pipe.send(produce(client, rank, consumers, nbytes, rounds))
        else:
            pipe.send(consume(client, rank - producers, producers, rounds))


def start_server(directory: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start a server on a free port of loopback that writes nothing to disk."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    server = subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL)
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return server, port
        time.sleep(0.05)
    server.kill()
    raise RuntimeError("redis-server did not start")


def main(turns: Turns) -> None:
    """Start a server and processes, and have them work."""
    pipes: list[Any] = []
    processes: list[Any] = []
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        server, port = start_server(directory)
        try:

            def setup(many: int, few: int) -> None:
                for rank in range(many + few):
                    pipe, far = context.Pipe()
                    processes.append(context.Process(target=work, args=(port, rank, many, few, far), daemon=True))
                    processes[-1].start()
                    pipes.append(pipe)

            def run(nbytes: int, rounds: int) -> float:
                start = time.perf_counter()
                for pipe in pipes:
                    pipe.send((nbytes, rounds))
                total = sum(pipe.recv() for pipe in pipes)
                took = time.perf_counter() - start
                if total < rounds * nbytes:
                    raise AssertionError(f"the consumers counted {total} in {rounds} rounds of {nbytes} bytes each")
                return took / rounds

            def feed(nbytes: int, rounds: int) -> list[float]:
                run(nbytes, warmth(rounds))
                return [run(nbytes, rounds)]

            turns.serve({"setup": setup, "feed": feed})
            for pipe in pipes:
                pipe.send(None)
            for process in processes:
                process.join(10)
        finally:
            server.terminate()
            server.wait()
