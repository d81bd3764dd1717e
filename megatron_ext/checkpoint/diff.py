"""What resuming under another configuration means, field by field.

The configuration asked for always rules; this says what that does to a run which was started
under a stored one. Pure data: both sides are plain dicts as ``dataclasses.asdict`` makes them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

HARMLESS, NOW, REFUSED = "harmless", "now", "refused"

# First matching pattern decides; keys are dotted, list entries are numbers.
RULES: tuple[tuple[str, str, str], ...] = (
    ("name", HARMLESS, "only names the run"),
    ("run_dir", HARMLESS, "only names the run's folder"),
    ("seed", REFUSED, "the order of the data follows from it: text would repeat or be left out"),
    ("model.family", HARMLESS, "only conversion reads it"),
    ("model.max_position_embeddings", HARMLESS, "only exports carry it"),
    ("model.make_vocab_size_divisible_by", HARMLESS, "only padding rows come or go"),
    ("model.padded_vocab_size", HARMLESS, "only padding rows come or go"),
    ("model.init_method_std", HARMLESS, "the weights are initialised already"),
    ("model.scaled_output_init", HARMLESS, "the weights are initialised already"),
    ("model.norm_head_gradient", NOW, "the head's gradient changes from the next step on"),
    ("model.z_loss_coefficient", NOW, "the loss changes from the next step on"),
    ("model.rotary_base", NOW, "phases without a base of their own rotate by it"),
    ("model.*", REFUSED, "the stored weights belong to another model"),
    ("parallel.*", HARMLESS, "weights and moments are cut anew for the layout"),
    ("precision.dtype", NOW, "master weights and moments stay fp32, matmuls change format"),
    ("precision.*", NOW, "gradients are summed in another format"),
    ("optimizer.*", NOW, "read from the configuration at every start, never from a checkpoint"),
    ("batch.*", NOW, "the ledger counts documents, so no text repeats or is left out"),
    ("data.synthetic", REFUSED, "the run's tokens were not of this kind"),
    ("data.sources.*.path", REFUSED, "the ledger counts the documents of the other file"),
    ("data.tokenizer.*", NOW, "its hash must still be the stored one, which loading checks"),
    ("data.*", NOW, "takes effect with the next batch"),
    ("phases.*", NOW, "takes effect where the phase has not passed it"),
    ("kernels.*", NOW, "other kernels round differently in the last bits"),
    ("watch.*", HARMLESS, "training does not depend on it"),
    ("evaluation.*", HARMLESS, "training does not depend on it"),
    ("logging.*", HARMLESS, "training does not depend on it"),
    ("checkpoint.*", HARMLESS, "training does not depend on it"),
    ("launch.*", HARMLESS, "training does not depend on it"),
    ("cluster.*", HARMLESS, "training does not depend on it"),
    ("slurm.*", HARMLESS, "training does not depend on it"),
)
ABSENT = "(absent)"


@dataclass(frozen=True)
class Difference:
    """One setting that is not what the checkpoint was trained with."""

    key: str
    stored: Any
    asked: Any
    verdict: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.stored} -> {self.asked} ({self.verdict}: {self.reason})"


def resume_diff(
    stored: dict[str, Any], asked: dict[str, Any], *, phase: int = 0
) -> list[Difference]:
    """Every field that differs, with its verdict; ``phase`` is the one the run stopped in.

    A change to a phase that is over is refused: the plan would no longer say what was trained.
    """
    before, after = dict(_leaves(stored)), dict(_leaves(asked))
    found = []
    for key in [*before, *(key for key in after if key not in before)]:
        old, new = before.get(key, ABSENT), after.get(key, ABSENT)
        if old != new or (type(old) is not type(new) and not _numbers(old, new)):
            verdict, reason = _judge(key, phase)
            if verdict == REFUSED and ABSENT in (old, new) and not key.startswith("phases."):
                verdict, reason = NOW, "came or went whole: nothing that was trained changes"
            found.append(Difference(key, old, new, verdict, reason))
    return found


def refuse(differences: list[Difference]) -> None:
    """Stop at differences that a run cannot survive.

    Raises:
        ValueError: naming the first one, both values and the reason.
    """
    refused = [one for one in differences if one.verdict == REFUSED]
    if not refused:
        return
    first, more = refused[0], len(refused) - 1
    raise ValueError(
        f"{first.key}={first.asked} cannot resume a run trained with {first.key}={first.stored}: "
        f"{first.reason}{f' (and {more} more such differences)' if more else ''}. Set it back, or "
        f"start a new run from these weights with checkpoint.load."
    )


def _judge(key: str, phase: int) -> tuple[str, str]:
    parts = key.split(".")
    if parts[0] == "phases" and len(parts) > 1 and int(parts[1]) < phase:
        return REFUSED, f"phase {parts[1]} is over, the run is in phase {phase}"
    for pattern, verdict, reason in RULES:
        if fnmatchcase(key, pattern):
            return verdict, reason
    return NOW, "a setting the stored run did not have, or no longer has"


def _numbers(a: object, b: object) -> bool:
    plain = (int, float)
    return isinstance(a, plain) and isinstance(b, plain) and bool not in (type(a), type(b))


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    inner: Any = None
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list | tuple):
        inner = enumerate(value)
    if inner is None or (prefix and not value):
        yield prefix, value if inner is None else f"{type(value).__name__}()"
        return
    for name, one in inner:
        yield from _leaves(one, f"{prefix}.{name}" if prefix else str(name))
