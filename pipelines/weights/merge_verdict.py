"""What merge says of a model that it made, and of the one that it began with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

State = Literal["within the limits", "not measured", "past the limits"]
STATES: tuple[str, ...] = get_args(State)
"""From good to bad."""


@dataclass(frozen=True)
class Verdict:
    """Where a model stands beside the one that it was made from."""

    state: State = "not measured"
    past_by: str = ""
    """How far it is past the limits, in words."""

    def __str__(self) -> str:
        return f"{self.state}, kept by --keep true: {self.past_by}" if self.past_by else self.state

    def facts(self, whose: str = "") -> dict[str, str]:
        """For a receipt; `whose` is "base_" if it is not of the model itself."""
        return {f"{whose}verdict": self.state, **({f"{whose}past_by": self.past_by} if self.past_by else {})}


def read_verdict(facts: Mapping[str, Any], whose: str = "") -> Verdict | None:
    """What a receipt says of a model, or of its base."""
    state = facts.get(f"{whose}verdict")
    if state and state not in STATES:  # the sentence itself, in receipts of former versions
        return Verdict("past the limits", state)
    return Verdict(state, facts.get(f"{whose}past_by", "")) if state else None


def worst_verdict(facts: Mapping[str, Any]) -> Verdict | None:
    """The worst that a model's receipt says of it and of its bases; None for one that merge did not make."""
    known = [verdict for whose in ("", "base_") if (verdict := read_verdict(facts, whose))]
    return max(known, key=lambda verdict: STATES.index(verdict.state), default=None)
