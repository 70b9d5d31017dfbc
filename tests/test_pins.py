"""Every version is pinned in one place, so that the two environments of the Makefile cannot contradict each other."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _pinned(path: str) -> set[str]:
    names = re.findall(r"^([\w.-]+)==", (ROOT / path).read_text(), re.M)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


def test_what_constraints_hold_is_not_pinned_again_for_vllm() -> None:
    constraints, vllm = _pinned("constraints.txt"), _pinned("tests/vllm_cpu/requirements.txt")
    assert constraints and vllm, "both files pin something"
    assert constraints & vllm == set(), "delete these from tests/vllm_cpu/requirements.txt"
