"""The one place where Hydra's tree becomes a typed ``JobConfig``, and back."""

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException
from megatron_ext.plan.scale import shrink
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.config import JobConfig
from megatron_ext import atomic
from megatron_ext.legal import nearest_words

CONF = Path(__file__).resolve().parents[1] / "conf"
GROUPS = ("model", "parallel", "optimizer", "precision", "cluster", "scale", "recipe")

# conf/train.yaml names this first in its defaults, so that every field exists and has a type
# while overrides are applied: a misspelt one is refused before anything starts.
ConfigStore.instance().store(name="job_schema", node=JobConfig)


def compose(overrides: list[str]) -> JobConfig:
    """The job that conf/ and ``overrides`` (``recipe=NAME``, ``optimizer.lr=3e-4``) describe.

    Raises:
        ValueError: one sentence naming what was typed and what would be right.
    """
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            tree = hydra_compose("train", overrides=overrides, return_hydra_config=True)
        choices = cast(dict[str, Any], OmegaConf.to_container(tree.hydra.runtime.choices))
        OmegaConf.set_struct(tree, False)
        del tree["hydra"]
        job = typed(tree)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_sentence(error, overrides)) from error
    job.composed_from = {k: str(v) for k, v in choices.items() if k in GROUPS and v is not None}
    return _scaled(job, overrides)


def _scaled(job: JobConfig, overrides: list[str]) -> JobConfig:
    """``job`` shrunk as ``scale=`` asks; what the person typed for single keys still wins."""
    if not job.scale.shrinks():
        return job
    run = shrink(job, job.scale)
    shrunk = replace(job, **{name: getattr(run, name) for name in _run_fields()})
    return override(shrunk, [o for o in overrides if _key(o).split("@")[0] not in GROUPS])


def _run_fields() -> list[str]:
    return ["model", "phases", "parallel", "optimizer", "batch", "data", "evaluation", "checkpoint"]


def _key(override_text: str) -> str:
    return override_text.split("=", 1)[0].lstrip("+~")


def override(job: JobConfig, overrides: list[str]) -> JobConfig:
    """``job`` with single values changed, each checked against its declared type.

    Raises:
        ValueError: an unknown key or a value of the wrong type.
    """
    tree = OmegaConf.structured(job)
    try:
        for parsed in OverridesParser.create().parse_overrides(overrides):
            key = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", parsed.key_or_group)
            value = parsed.value()
            if isinstance(value, dict):
                OmegaConf.update(tree, key, value, merge=True)
            else:
                OmegaConf.update(tree, key, value)
        return cast(JobConfig, OmegaConf.to_object(tree))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_sentence(error, overrides)) from error


def typed(tree: DictConfig) -> JobConfig:
    """A plain ``JobConfig`` with nothing of Hydra left in it.

    The merge repeats the type check for a tree that did not come from conf/, such as the
    config.yaml that a restarted run reads back.
    """
    missing = sorted(OmegaConf.missing_keys(OmegaConf.merge(OmegaConf.structured(JobConfig), tree)))
    if missing:
        raise ValueError(_missing(missing))
    return cast(
        JobConfig, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(JobConfig), tree))
    )


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
    text = path.read_text()
    if "${" in text:
        raise ValueError(f"{path} holds an interpolation (${{...}}): a saved job is plain values.")
    try:
        tree = yaml.safe_load(text)
        return typed(OmegaConf.create(tree))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
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


def sweep(overrides: list[str]) -> list[list[str]]:
    """The runs that comma-separated values ask for: ``a=1,2 b=3`` is two lists.

    Raises:
        ValueError: an override that cannot be parsed.
    """
    lists: list[list[str]] = [[]]
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise ValueError(_sentence(error, overrides)) from error
    for one in parsed:
        if one.is_sweep_override():
            values = [f"{one.key_or_group}={v}" for v in one.sweep_string_iterator()]
        else:
            values = [one.input_line or ""]
        lists = [[*done, value] for done in lists for value in values]
    return lists


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def _sentence(error: Exception, overrides: list[str]) -> str:
    """Hydra's complaint as one sentence in the words that were typed."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = _first_line(cause)
    if found := re.search(r"Key '(\S+)' (?:is )?not in '(\w+)'", text):
        return _unknown_key(found[1], getattr(cause, "full_key", None) or found[1], overrides)
    if found := re.search(r"Could not override '([^']+)'", _first_line(error)):
        key = found[1]
        typed_value = next((o for o in overrides if _key(o) == key), key)
        return f"{typed_value}: {text}"
    if found := re.search(r"[Ii]n '[^']+': [Cc]ould not find '([\w/]+)'", str(error)):
        group, _, word = found[1].partition("/")
        return _unknown_choice(group, word)
    if isinstance(error, ConfigCompositionException):
        return text
    return text


def _unknown_choice(group: str, word: str) -> str:
    known = choices(group)
    near = nearest_words(word, known) or known[:8]
    return f"{group}={word} is not known: did you mean {' or '.join(near)}?"


def _unknown_key(key: str, full_key: str, overrides: list[str]) -> str:
    typed_text = next((o for o in overrides if key in _key(o).split(".")), full_key)
    parent = OmegaConf.structured(JobConfig)
    for part in str(full_key).split(".")[:-1]:
        if not isinstance(parent, DictConfig) or OmegaConf.is_missing(parent, part):
            break
        parent = parent[part]
    known = [str(k) for k in parent] if isinstance(parent, DictConfig) else []
    near = nearest_words(key, known)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known here: {', '.join(known)}."
    return f"{typed_text}: there is no key {full_key}; {hint}"


logging.getLogger("hydra").setLevel(logging.WARNING)
