"""Every example runs, as a user runs it: as a script, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SAYS = {
    "digits.py": "test accuracy  0.9",
    "hello.py": "dog[2] feels 7.5 pulled by all, ranks add up to 3",
    "mixed_kinds.py": "counter: allreduce gave numpy [11.0, 22.0], broadcast gave torch [0, 1, 2]",
    "overlap.py": "worker[2] averaged layer 0 to 1.0 and layer 1 to 11.0",
    "two_groups.py": "player[1] was given weights of [1.5, 3.0, 4.5]",
    "weight_sync.py": "served whole (",
}
"""What each example prints, among other things."""

SHORT = {"digits.py": ["--epochs", "6", "--readers", "3"], "weight_sync.py": ["--width", "64"]}

# On Ray, `make demo` runs digits.py, and test_digits.py what is in it.
RUNS = [(name, "inproc") for name in SAYS] + [("hello.py", "ray")]


@pytest.mark.parametrize(("name", "runtime"), RUNS)
def test_example(name, runtime):
    command = [sys.executable, f"examples/{name}", "--runtime", runtime, *SHORT.get(name, [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert SAYS[name] in done.stdout


def test_every_example_is_tested():
    assert sorted(SAYS) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def test_hello_is_short_and_opens_the_readme():
    hello = (ROOT / "examples/hello.py").read_text()
    assert len(hello.splitlines()) < 30
    first_block = (ROOT / "README.md").read_text().split("```")[1]
    assert first_block == f"python\n{hello}"
