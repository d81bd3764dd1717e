"""Which of the ranks that stand still holds the others up, and the sentence that says so. Pure."""

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_ext.resilience.council import Member

STOPPED = ("T", "t")
GROUPS = 4  # places that a sentence lists


def culprit(ranks: dict[int, "Member"]) -> tuple[int, str]:
    """The rank to blame for a hang and why, from what all watchers saw.

    In this order: a rank that is stopped, or waits for a device; one that is in no collective,
    those behind first; and where all wait for each other, one that waits in another place than
    most: it skipped a collective or added one. Of two, it is the one that is further on.
    """
    behind = min((m.step, m.count) for m in ranks.values())
    ahead = max((m.step, m.count) for m in ranks.values())
    places = Counter((m.call, m.frame) for m in ranks.values())
    apart = len(places) > 1 and all(m.call not in ("", "?") for m in ranks.values())

    def blame(rank: int) -> tuple:
        m = ranks[rank]
        late = behind == ahead or (m.step, m.count) != behind
        if apart:
            odd = (places[m.call, m.frame], -m.step, -m.count, -m.calls, -rank)
        else:
            odd = (late, bool(m.call), rank, 0, 0)
        return (m.process not in (*STOPPED, "D"), *odd)

    rank = min(ranks, key=blame)
    member = ranks[rank]
    waited = max(m.overdue for m in ranks.values())
    text = f"no progress for {waited:.0f} s in section {member.section}: rank {rank} on "
    text += member.host
    if member.process in STOPPED:
        return rank, f"{text} is stopped"
    if apart:
        return rank, f"{text} is in another collective than its peers: {_places(ranks, rank)}"
    text += " is behind"
    if behind != ahead:
        text += f" at beat {member.count}, others at {ahead[1]}"
    return rank, text + (f", in {member.frame}" if member.frame else "")


def _places(ranks: dict[int, "Member"], first: int) -> str:
    """Who waits where: the blamed rank's place first, then the fullest ones."""
    groups: dict[tuple[str, str], list[int]] = {}
    for rank, m in ranks.items():
        groups.setdefault((m.call, m.frame), []).append(rank)
    order = sorted(groups, key=lambda g: (first not in groups[g], -len(groups[g])))
    return "; ".join(
        f"{_names(groups[g])} at call {ranks[min(groups[g])].calls} ({g[0]} of {g[1]})"
        for g in order[:GROUPS]
    )


def _names(ranks: list[int]) -> str:
    few = ", ".join(map(str, sorted(ranks)[:8]))
    return f"rank{'s' if len(ranks) > 1 else ''} {few}{' and more' if len(ranks) > 8 else ''}"
