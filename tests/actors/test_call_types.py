"""That a type checker knows calls: mypy finds the errors that `tests/typing/handles.py` marks, and no other."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = ROOT / "tests" / "typing" / "handles.py"


def test_mypy_checks_the_arguments_of_calls() -> None:
    lines = FILE.read_text().splitlines()
    expected = {number for number, line in enumerate(lines, 1) if line.endswith("# error")}
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--no-pretty", str(FILE)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    name = re.escape(str(FILE.relative_to(ROOT)))
    found = {int(number) for number in re.findall(rf"^{name}:(\d+): error: ", done.stdout, re.MULTILINE)}
    assert expected
    assert found == expected, done.stdout + done.stderr
