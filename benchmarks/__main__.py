"""Compare Gangline with its peers: `python -m benchmarks NAME [--repeat N] [--json FILE]`.

`python -m benchmarks readme FOLDER` puts what those files hold into README.md, and draws the plot.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

from benchmarks.machine import describe_machine
from benchmarks.report import render

BENCHMARKS = {
    "calls": "calls to actors, against xoscar, Ray, its Compiled Graphs and Monarch",
    "collectives": "collectives between processes of one host, against torch's Gloo and MPICH",
    "scopes": "what scopes cost an allreduce, against the commit that GANGLINE_BEFORE names and agreement over links",
    "n_to_m": "what 4 producers send to 2 consumers, against Ray objects",
    "repartition": "moving a sharded tensor from 4 ranks to 2, against gathering on one and broadcasting",
    "rows": "what 4 producers of rows stream to 2 consumers, against Ray objects and Redis streams",
    "store": "tensors by reference, against Ray objects and Ray Direct Transport",
    "start": "what starting and stopping a gang of 6 costs, against plain Ray actors",
    "idle": "the CPU that 8 idle actors take, against plain Ray actors",
}


def main() -> int:
    """Run one benchmark."""
    if sys.argv[1:2] == ["readme"]:
        from benchmarks.readme import main as write

        return write(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    summary = "; ".join(f"{name}: {what}" for name, what in BENCHMARKS.items())
    parser.add_argument("name", choices=BENCHMARKS, help=summary)
    parser.add_argument("--repeat", type=int, help="rounds; each measures every side once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    arguments = parser.parse_args()
    if arguments.repeat is not None and arguments.repeat < 1:
        parser.error(f"--repeat is {arguments.repeat}; it must be at least 1")
    module = importlib.import_module(f"benchmarks.{arguments.name}")
    repeat = arguments.repeat or module.REPEAT
    measures = module.measure(repeat)
    print(render(measures))
    if arguments.json is not None:
        report = {
            "benchmark": arguments.name,
            "machine": describe_machine(),
            "rounds": repeat,
            "measures": [measure.as_json() for measure in measures],
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
