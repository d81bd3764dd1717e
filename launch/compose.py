"""The one place where Hydra's tree becomes a typed ``JobConfig``, and back."""

import itertools
import logging
import math
import re
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.config import JobConfig
from megatron_ext import atomic
from megatron_ext.legal import nearest_words
from megatron_ext.plan.scale import shrink

CONF = Path(__file__).resolve().parents[1] / "conf"
MOST_RUNS = 1000  # of one --multirun, unless --most-runs says otherwise
GROUPS = ("model", "parallel", "optimizer", "precision", "cluster", "scale", "recipe")

# conf/train.yaml names this first in its defaults, so that every field exists and has a type
# while overrides are applied: a misspelt one is refused before anything starts.
ConfigStore.instance().store(name="job_schema", node=JobConfig)


def compose(overrides: list[str]) -> JobConfig:
    """The job that conf/ and ``overrides`` (``recipe=NAME``, ``optimizer.lr=3e-4``) describe.

    Hydra chooses and merges the files of the groups. Single values come after it, because it
    cannot reach into lists (``phases.0.tokens=1``) or typed dicts (``data.sources.web.path=p``).

    Raises:
        ValueError: one sentence naming what was typed and what would be right.
    """
    groups = [o for o in overrides if _key(o).split("@")[0] in GROUPS]
    values = [o for o in overrides if o not in groups]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            tree: Any = hydra_compose("train", overrides=groups, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_sentence(error)) from error
    picked = cast(dict[str, Any], OmegaConf.to_container(tree.hydra.runtime.choices))
    OmegaConf.set_struct(tree, False)
    del tree["hydra"]
    tree = OmegaConf.merge(OmegaConf.structured(JobConfig), tree)
    job = typed(change(tree, values))
    job.composed_from = {k: str(v) for k, v in picked.items() if k in GROUPS and v is not None}
    return _scaled(job, values)


def _scaled(job: JobConfig, values: list[str]) -> JobConfig:
    """``job`` shrunk as ``scale=`` asks; what the person typed for single keys still wins."""
    if not job.scale.shrinks():
        return job
    return override(shrink(job, job.scale), values)


def _key(override_text: str) -> str:
    return override_text.split("=", 1)[0].lstrip("+~")


def override(job: JobConfig, values: list[str]) -> JobConfig:
    """``job`` with single values changed, each checked against its declared type.

    Raises:
        ValueError: an unknown key or a value of the wrong type.
    """
    return typed(change(OmegaConf.structured(job), values))


def change(tree: Any, values: list[str]) -> Any:
    """``tree`` with each ``dotted.key=value`` put in its place."""
    for text in values:
        try:
            parsed = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise ValueError(f"{text} cannot be read: write dotted.key=value.") from error
        if not _key(text):
            raise ValueError(f"{text} cannot be read: write dotted.key=value.")
        if parsed.is_delete():
            raise ValueError(f"{text}: a key cannot be deleted; set it to null instead.")
        *path, last = _key(text).split(".")
        node = tree
        for number, part in enumerate(path):
            node = _child(node, part, ".".join(path[:number]), text)
        _child(node, last, ".".join(path), text)
        _set(node, last, parsed.value(), text)
    return tree


def _child(node: Any, part: str, parent: str, text: str) -> Any:
    """What lies under ``part``, made where a typed dict does not hold it yet."""
    if isinstance(node, ListConfig):
        if not part.isdigit() or int(part) >= len(node):
            raise ValueError(f"{text}: {parent} has elements 0 to {len(node) - 1}, not {part}.")
        return node[int(part)]
    if not isinstance(node, DictConfig):
        raise ValueError(f"{text}: {parent} is a single value and has no key {part}.")
    known = set(node.keys())  # `in` would deny keys that have no value yet
    if part not in known and OmegaConf.get_type(node) is dict:
        element = node._metadata.element_type
        if is_dataclass(element):
            node[part] = OmegaConf.structured(element)
            return node[part]
        return None
    if part not in known:
        raise ValueError(f"{text}: there is no key {_joined(parent, part)}; {_hint(part, node)}")
    return None if OmegaConf.is_missing(node, part) else node[part]


def _joined(parent: str, part: str) -> str:
    return f"{parent}.{part}" if parent else part


def _hint(part: str, node: DictConfig) -> str:
    known = [str(key) for key in node]
    near = nearest_words(part, known)
    return f"did you mean {' or '.join(near)}?" if near else f"known here: {', '.join(known)}."


def _set(node: Any, last: str, value: Any, text: str) -> None:
    try:
        if isinstance(node, ListConfig):
            node[int(last)] = OmegaConf.merge(node[int(last)], value)
        elif value == {} and OmegaConf.get_type(node, last) is dict:
            node[last] = {}  # a merge would keep what is there
        elif isinstance(value, dict | list):  # a merge turns plain items into typed ones
            merged: Any = OmegaConf.merge(node, {last: value})
            node[last] = merged[last]
        else:
            node[last] = value
    except OmegaConfBaseException as error:
        raise ValueError(f"{text}: {_first_line(error)}.") from error


def typed(tree: Any) -> JobConfig:
    """A plain ``JobConfig`` with nothing of Hydra left in it.

    The merge repeats the type check for a tree that did not come from conf/, such as the
    config.yaml that a restarted run reads back.
    """
    try:
        whole = OmegaConf.merge(OmegaConf.structured(JobConfig), tree)
        if missing := sorted(OmegaConf.missing_keys(whole)):
            raise ValueError(_missing(missing))
        return cast(JobConfig, OmegaConf.to_object(whole))
    except OmegaConfBaseException as error:
        raise ValueError(_sentence(error)) from error


def _missing(keys: list[str]) -> str:
    if "phases" in keys or "model" in keys or "model.num_layers" in keys:
        return (
            f"no value for {', '.join(keys[:4])}: choose recipe=SYSTEM/STAGE "
            f"(python -m launch.train --help lists them), or give each key."
        )
    return f"no value for {', '.join(keys)}: give {keys[0]}=VALUE."


def load(path: Path) -> JobConfig:
    """The job that ``save`` wrote. Interpolations and tags are refused: a file is only data.

    Raises:
        ValueError: the file is not a saved job of this version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file.")
    try:
        text = path.read_text()
        if "${" in text:
            raise ValueError("it holds an interpolation (${...}), and a saved job is plain values")
        tree = yaml.safe_load(text)
        if not isinstance(tree, dict) or not tree:
            raise ValueError("it holds no keys")
        return typed(OmegaConf.create(tree))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not a saved job: {_first_line(error)}") from error


def dump(job: JobConfig) -> str:
    """``job`` as YAML that ``load`` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(job))


def save(job: JobConfig, path: Path) -> None:
    """Write ``job`` whole or not at all."""
    atomic.write_text(path, dump(job))


def choices(group: str) -> list[str]:
    """Every word that ``group=`` can take."""
    root = CONF / group
    return sorted(str(p.relative_to(root).with_suffix("")) for p in root.rglob("*.yaml"))


def sweep(overrides: list[str], *, most: int = MOST_RUNS) -> list[list[str]]:
    """The runs that comma-separated values ask for: ``a=1,2 b=3`` is two lists.

    Raises:
        ValueError: an override that cannot be parsed, or more than ``most`` runs.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        for one in parsed:
            _refuse_sweep(one, [other.key_or_group for other in parsed])
        swept = {one.key_or_group: _values(one) for one in parsed if one.is_sweep_override()}
        if (asked := math.prod(swept.values())) > most:
            product = " * ".join(f"{count:,} of {key}" for key, count in swept.items())
            raise ValueError(
                f"--multirun asks for {product} = {asked:,} runs, above --most-runs={most}: give "
                f"fewer values, or raise --most-runs."
            )
        if not asked:
            raise ValueError(f"{' '.join(overrides)} asks for no run: a range holds no value.")
        lists = [
            [f"{one.key_or_group}={value}" for value in one.sweep_string_iterator()]
            if one.is_sweep_override()
            else [one.input_line or ""]
            for one in parsed
        ]
    except HydraException as error:
        raise ValueError(f"{' '.join(overrides)} cannot be read: {_first_line(error)}") from error
    return [list(run) for run in itertools.product(*lists)]


def _refuse_sweep(one: Override, keys: list[str]) -> None:
    """Refuse what cannot be counted, or what would be counted twice."""
    text = one.input_line or one.key_or_group
    if one.is_sweep_override() and keys.count(one.key_or_group) > 1:
        raise ValueError(f"{text}: {one.key_or_group} is given more than once: give it all values.")
    if isinstance(one.value(), Glob):
        raise ValueError(f"{text}: write the choices out, a,b,c; --help lists them.")
    if isinstance(value := one.value(), RangeSweep) and not value.step:
        raise ValueError(f"{text}: a range with step 0 has no end.")


def _values(one: Override) -> int:
    """How many values ``one`` sweeps over. A range is counted without being written out."""
    value = one.value()
    if isinstance(value, RangeSweep):
        length = (value.stop or 0) - (value.start or 0)
        return max(0, math.ceil(length / value.step))
    return sum(1 for _ in one.sweep_iterator())


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def _sentence(error: Exception) -> str:
    """Hydra's complaint as one sentence."""
    if found := re.search(r"[Cc]ould not find '([\w/.-]+)'", str(error)):
        group, _, word = found[1].partition("/")
        known = choices(group)
        near = nearest_words(word, known)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}."
        return f"{group}={word} is not known: {hint}"
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    key = getattr(cause, "full_key", None)
    return f"{key}: {_first_line(cause)}" if key else _first_line(cause)


logging.getLogger("hydra").setLevel(logging.WARNING)
