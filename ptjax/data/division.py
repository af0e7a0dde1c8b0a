"""Divides labelled records into training and validation, stratified by label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

import numpy as np


def divide(
    labels: Sequence[tuple[str, ...]], units: Sequence[Hashable], share: float, seed: int
) -> list[bool]:
    """Whether each of N records is held out.

    Every label gets `share` of its records, as far as units allow: rounded so that the shares add
    up, and one record of it stays. The same arguments give the same division.

    Args:
        labels: of each record: one, none, or several.
        units: of each record; records of one unit are on the same side.
        seed: decides which records.
    """
    rng = np.random.default_rng(seed)
    members: dict[Hashable, list[int]] = {}
    for index, unit in enumerate(units):
        members.setdefault(unit, []).append(index)
    # A record without a label counts as one of the label ().
    counted: list[tuple[Hashable, ...]] = [of_record or ((),) for of_record in labels]
    count = Counter(label for of_record in counted for label in of_record)
    wanted = _wanted(count, share)
    taken = Counter[Hashable]()
    held_out = [False] * len(labels)
    groups = list(members.values())
    order = [groups[i] for i in rng.permutation(len(groups))]
    for group in sorted(order, key=len, reverse=True):  # stable: equal sizes in random order
        more = Counter(label for index in group for label in counted[index])
        # The change of the squared distance to the wanted counts.
        change = sum(n * (2 * (taken[x] - wanted[x]) + n) for x, n in more.items())
        # One of each label stays.
        if change < 0 and all(taken[label] + n < count[label] for label, n in more.items()):
            taken += more
            for index in group:
                held_out[index] = True
    return held_out


def connected(keys: Iterable[Sequence[Hashable]]) -> list[Hashable]:
    """Returns the unit of each record; records with a key in common have the same, transitively.

    >>> connected([["a"], ["a", "b"], ["c"], ["b"]])
    ['a', 'a', 'c', 'a']

    Args:
        keys: of each record, at least one.
    """
    parents: dict[Hashable, Hashable] = {}

    def root(key: Hashable) -> Hashable:
        while parents.setdefault(key, key) != key:
            parents[key] = parents[parents[key]]
            key = parents[key]
        return key

    firsts = []
    for first, *others in keys:
        firsts.append(first)
        for other in others:
            parents[root(other)] = root(first)
    return [root(first) for first in firsts]


def _wanted(count: Counter[Hashable], share: float) -> dict[Hashable, int]:
    """How many records of each label to hold out: `share` of all, by the largest remainder."""
    exact = {label: share * number for label, number in count.items()}
    wanted = {label: int(number) for label, number in exact.items()}
    missing = round(sum(exact.values())) - sum(wanted.values())
    by_remainder = sorted(exact, key=lambda label: wanted[label] - exact[label])
    for label in by_remainder[:missing]:
        wanted[label] += 1
    return wanted
