"""Compare Gangline with its peers: `python -m benchmarks NAME [--repeat N] [--json FILE]`."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.report import describe_machine, render

BENCHMARKS = {
    "collectives": "collectives between processes of one host, against torch's Gloo",
    "repartition": "moving a sharded tensor from 4 ranks to 2, against gathering on one and broadcasting",
    "start": "what starting and stopping a gang of 6 costs, against plain Ray actors",
}


def main() -> int:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    summary = "; ".join(f"{name}: {what}" for name, what in BENCHMARKS.items())
    parser.add_argument("name", choices=BENCHMARKS, help=summary)
    parser.add_argument("--repeat", type=int, help="rounds; each measures every side once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    arguments = parser.parse_args()
    if arguments.repeat is not None and arguments.repeat < 1:
        parser.error(f"--repeat is {arguments.repeat}; it must be at least 1")
    module = importlib.import_module(f"benchmarks.{arguments.name}")
    comparisons = asyncio.run(module.measure(arguments.repeat or module.REPEAT))
    print(render(comparisons))
    if arguments.json is not None:
        report = {"machine": describe_machine(), "comparisons": [asdict(comparison) for comparison in comparisons]}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
