"""The main job: what readers own, and that the trained weights are those of one process."""

import asyncio
import importlib
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def digits():
    # On the path, not only imported: a gang's processes look for modules where its starter does.
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("digits")


@pytest.mark.parametrize(
    ("readers", "trainers", "runtime"), [(4, 2, "inproc"), (3, 3, "inproc"), (2, 4, "inproc"), (3, 2, "ray")]
)
def test_weights_are_those_of_one_process(digits, readers, trainers, runtime, request):
    if runtime == "ray":
        request.getfixturevalue("ray_session")
    job = {"readers": readers, "trainers": trainers, "epochs": 3, "seed": 7}
    result = asyncio.run(digits.train(**job, runtime=runtime))
    expected = digits.reference(**job)
    for trainer in result.trainers:
        np.testing.assert_array_equal(trainer.weights, result.trainers[0].weights)
        assert trainer.weights.dtype == np.float32
    np.testing.assert_allclose(result.trainers[0].weights, expected, rtol=1e-5, atol=5e-6)


def test_the_main_job_learns(digits):
    result = asyncio.run(digits.train(runtime="inproc"))
    assert result.accuracy >= 0.95
    assert result.rows_per_second > 0


def test_every_trainer_gets_as_many_batches_of_the_same_size(digits):
    result = asyncio.run(digits.train(readers=4, trainers=3, epochs=2, batch=10, runtime="inproc"))
    assert {(trainer.batches, trainer.rows) for trainer in result.trainers} == {(94, 940)}  # 2 x (1437 // 30)


@pytest.mark.parametrize("readers", [1, 2, 4, 7])
def test_slices_are_uneven_and_whole(digits, readers):
    rows = np.arange(1000)
    slices = digits.cut(rows, readers)
    np.testing.assert_array_equal(np.concatenate(slices), rows)
    shares = np.arange(1, readers + 1) / np.arange(1, readers + 1).sum()
    np.testing.assert_allclose([len(part) for part in slices], 1000 * shares, atol=1)


def test_four_readers_own_ten_to_forty_percent(digits):
    assert [len(part) for part in digits.cut(np.arange(1000), 4)] == [100, 200, 300, 400]


def test_too_few_rows_for_a_round_are_an_error(digits):
    with pytest.raises(ValueError, match="30 rows do not fill one round of 2 trainers x 16 rows"):
        digits.count_steps([10, 20], trainers=2, batch=16)


def test_test_rows_are_not_trained_on(digits):
    training, testing = digits.load()
    assert (len(training), len(testing)) == (1437, 360)
    assert training.max() == 16  # the pixels; labels end at 9
    assert set(training[:, -1]) == set(testing[:, -1]) == set(range(10))
