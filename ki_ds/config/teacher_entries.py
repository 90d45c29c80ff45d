"""Several teachers of one run: a list in its configuration, and the rules that the list must keep (Table 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ki_ds.errors import UserError


@dataclass(frozen=True)
class TeacherEntry:
    """One of several teachers. Either every one has domains, or none has and they are averaged.

    Args:
        path: as teacher.path.
        domains: domains of data.sources whose rows it teaches; rows of a domain without a teacher learn alone.
        share: its weight in the average of the teachers' softmaxes, relative to the others'; null is 1.
    """

    path: str
    domains: list[str] | None = None
    share: float | None = None


def check_entries(entries: Sequence[TeacherEntry], domains: Sequence[str]) -> None:
    """Return silently, or raise UserError for the first rule that the list breaks.

    Args:
        domains: those that the run trains on.
    """
    if not entries:
        raise UserError("teachers is empty; give at least one entry, e.g. [{path: runs/wb, domains: [wb]}], or null")
    routed = entries[0].domains is not None
    owners: dict[str, str] = {}
    for number, entry in enumerate(entries):
        name = f"teachers.{number}"
        if not entry.path:
            raise UserError(f"{name}.path is empty; give a teacher's folder")
        if (entry.domains is not None) != routed:
            raise UserError(
                f"teachers.0 has {'' if routed else 'no '}domains, {name} has {'none' if routed else 'some'}; give "
                "every entry domains (each row its domain's teacher), or none (the average of all)"
            )
        _check_share(name, entry, routed=routed, alone=len(entries) == 1)
        if entry.domains == []:
            raise UserError(f"{name}.domains is empty; name at least one, or leave domains out of every entry")
        for domain in entry.domains or ():
            if domain not in domains:
                raise UserError(
                    f"{name}.domains names {domain}, which the run does not train on; take of {', '.join(domains)}"
                )
            if domain in owners:
                raise UserError(f"domain {domain} is given to {owners[domain]} and {name}; give it to one of them")
            owners[domain] = name


def _check_share(name: str, entry: TeacherEntry, *, routed: bool, alone: bool) -> None:
    if entry.share is None:
        return
    if routed or alone:
        why = "domains, which part the rows" if routed else "a teacher that is the only one"
        raise UserError(f"{name}.share={entry.share:g} has no meaning with {why}; leave it out")
    if not 0 < entry.share < math.inf:
        raise UserError(f"{name}.share={entry.share:g} is not positive; change it")
