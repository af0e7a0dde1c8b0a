"""How much each training example counts in the loss, by its label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging

from ptjax.data.examples import Example
from ptjax.data.tasks import Task
from ptjax.errors import near


def example_weights(
    class_weights: Mapping[str | int, float] | str, task: Task, examples: Sequence[Example]
) -> np.ndarray:
    """The weight float32 [N] of each example; see `ptjax.training.loss.Loss.class_weights`.

    Args:
        class_weights: 'balanced': N / (number of labels * examples of the label), so that every
            label has the same total weight and the mean is 1. Or a weight for labels, named by
            their texts or, as in the verbalizer, by their values; 1 for the others.

    Raises:
        InputError: the task has no closed set of labels, or not this label.
    """
    if task.labels is None or task.verbalizer is None:
        raise task.error("Loss.class_weights needs a closed set of labels; its targets are open")
    count = Counter(example.targets for example in examples)
    if isinstance(class_weights, str):
        weights = {label: len(examples) / (len(count) * n) for label, n in count.items()}
    else:
        weights = dict.fromkeys(task.labels, 1.0)
        for key, weight in class_weights.items():
            label = str(key) if str(key) in weights else task.verbalizer.get(str(key).strip())
            if label is None:
                raise task.error(
                    f"Loss.class_weights has {key!r}, not one of its labels"
                    f"{near(str(key), task.labels)}"
                )
            weights[label] = weight
    listed = ", ".join(f"{label} {weights[label]:.3g}" for label in task.labels if label in weights)
    logging.info("%s: class weights %s", task.name, listed)
    return np.array([weights[example.targets] for example in examples], np.float32)
