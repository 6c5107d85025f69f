"""That a type checker knows gangs: mypy finds the errors that `tests/typing/gangs.py` marks, and no other."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = ROOT / "tests" / "typing" / "gangs.py"


def test_mypy_knows_the_actors_of_a_role():
    lines = FILE.read_text().splitlines()
    expected = {number for number, line in enumerate(lines, 1) if line.endswith("# error")}
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--no-pretty", str(FILE)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    found = {int(number) for number in re.findall(r"gangs\.py:(\d+): error: ", done.stdout)}
    assert expected
    assert found == expected, done.stdout + done.stderr
