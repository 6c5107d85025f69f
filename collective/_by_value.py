"""Pickles that a process can read whose `__main__` is another."""

from __future__ import annotations

import pickle


def dumps(obj: object) -> bytes:
    """Pickle an object; what lives in `__main__`, in functions or in no module at all goes by value, as in calls.

    Such a class is the same one again wherever it came from and goes to: cloudpickle knows those it has seen.

    Raises:
        Exception: it cannot be pickled; whatever it raises.
    """
    try:
        data = pickle.dumps(obj, pickle.HIGHEST_PROTOCOL)
    except Exception:  # whatever a __reduce__ raises: cloudpickle tries next, and reports its own failure
        data = b"__main__"
    if b"__main__" not in data:
        return data
    import cloudpickle  # type: ignore[import-untyped]  # slow to import, and seldom needed

    by_value: bytes = cloudpickle.dumps(obj, pickle.HIGHEST_PROTOCOL)
    return by_value
