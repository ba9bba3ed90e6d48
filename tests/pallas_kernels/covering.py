"""Which of many configs to lower where there is no GPU.

Lowering one takes half a second, and most configs of a problem differ from another in one field.
Without a GPU a set is lowered in which every value of every field occurs; on a GPU each one runs
(``make test-gpu``), and ``JAXQUANT_EVERY_CONFIG=1`` lowers each one here.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def values_of(config: Any) -> set[tuple[type, str, Any]]:
    """Return the kind of a config with each of its fields and their values."""
    return {
        (type(config), field.name, getattr(config, field.name))
        for field in dataclasses.fields(config)
    }


def covering(jobs: Iterable[T], config: Callable[[T], Any]) -> list[T]:
    """Return jobs in which every value of every field of any job's config occurs.

    Args:
        jobs: what would be lowered.
        config: gives a job's config, a dataclass.
    """
    jobs = list(jobs)
    if os.environ.get("JAXQUANT_EVERY_CONFIG"):
        return jobs
    chosen: list[T] = []
    left = set().union(*(values_of(config(job)) for job in jobs))
    while left:
        best = max(jobs, key=lambda job: len(values_of(config(job)) & left))
        chosen.append(best)
        left -= values_of(config(best))
    return chosen
