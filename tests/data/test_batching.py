"""The settings of batches: lengths by name, and what is refused."""

from __future__ import annotations

import re

import pytest

from ptjax.data.batching import Batching
from ptjax.errors import InputError


@pytest.mark.parametrize(
    ("given", "inputs", "targets"),
    [
        (None, 512, 16),
        ({}, 512, 16),
        ({"inputs": 64}, 64, 16),
        ({"targets": 4}, 512, 4),
        ({"targets": 4, "inputs": 64}, 64, 4),
    ],
)
def test_lengths_that_are_not_given_are_t5xs(given, inputs, targets) -> None:
    batching = Batching(feature_lengths=given)
    assert batching.lengths == {"inputs": inputs, "targets": targets}
    explicit = Batching(feature_lengths={"inputs": inputs, "targets": targets})
    assert batching.identity() == explicit.identity() == {"feature_lengths": explicit.lengths}


def test_smallest_settings_and_those_below() -> None:
    batching = Batching(batch_size=1, microbatches=1, row_length=1)
    assert (batching.pack, batching.buckets) == (False, None)
    assert (Batching().batch_size, Batching().microbatches, Batching().row_length) == (32, 1, None)
    for settings, message in [
        ({"batch_size": 0}, "BATCH_SIZE"),
        ({"microbatches": 0}, "MICROBATCHES"),
        ({"row_length": 0}, "row_length"),
        ({"batch_size": 6, "microbatches": 4}, "BATCH_SIZE (6) must be divisible by MICROBATCHES "),
        ({"feature_lengths": {"input": 4}}, "TASK_FEATURE_LENGTHS has 'input', not 'inputs' or "),
    ]:
        with pytest.raises(InputError, match=re.escape(message)):
            Batching(**settings)
