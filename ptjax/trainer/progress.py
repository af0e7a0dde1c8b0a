"""How far a run has got; saved as plain JSON in its checkpoints."""

from __future__ import annotations

import dataclasses

from ptjax.files import JsonObject

_SAVED_AS = {"members": "standings", "member_ids": "held"}
"""Names of fields in checkpoints, which every version must read."""


@dataclasses.dataclass
class MemberProgress:
    """How far one member of a run has got.

    Attributes:
        best_value: the highest value of the metric that selects; None without an evaluation.
        best_step: the step of the best export; None before the first one.
        without_gain: the number of evaluations since the best one.
        stopped: it no longer trains, because it failed or ran out of patience.
        failed: its loss, its variables or its score were not finite.
        loss_sum, norm_sum: sums of its loss and gradient norm over the steps since the last logged
            one.
        best_before: `best_step` before the last evaluation, to which the second newest checkpoint
            refers.
    """

    best_value: float | None = None
    best_step: int | None = None
    without_gain: int = 0
    stopped: bool = False
    failed: bool = False
    loss_sum: float = 0.0
    norm_sum: float = 0.0
    best_before: int | None = None


@dataclasses.dataclass
class RunProgress:
    """How far a run has got.

    Attributes:
        members: the progress of each member, by its id.
        member_ids: the ids of the members in the train state, in its order.
        step: the number of steps done.
        steps_summed: the number of steps since the last logged one.
        seconds: the time that all starts of the run took together, up to the checkpoint.
    """

    members: list[MemberProgress]
    member_ids: list[int]
    step: int = 0
    steps_summed: int = 0
    seconds: float = 0.0

    @classmethod
    def at_start(cls, count: int) -> RunProgress:
        """Makes the progress of a run with `count` members before its first step."""
        return cls([MemberProgress() for _ in range(count)], list(range(count)))

    def to_json(self) -> JsonObject:
        """Returns the progress as plain JSON values. `from_json` is the inverse."""
        fields = dataclasses.asdict(self)
        return {_SAVED_AS.get(name, name): value for name, value in fields.items()}

    @classmethod
    def from_json(cls, saved: JsonObject) -> RunProgress:
        """Makes the progress from the result of `to_json`."""
        names = [field.name for field in dataclasses.fields(cls)]
        fields = {name: saved[_SAVED_AS.get(name, name)] for name in names}
        fields["members"] = [MemberProgress(**member) for member in fields["members"]]
        return cls(**fields)

    @property
    def running(self) -> list[tuple[int, int]]:
        """The (place in the train state, member id) of every member that still trains."""
        places = enumerate(self.member_ids)
        return [(place, member) for place, member in places if not self.members[member].stopped]
