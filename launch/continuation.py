"""Whether what a run goes on from is whole, and of this model and tokenizer."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.config import JobConfig
    from megatron_ext.models.config import ModelConfig


def check_checkpoint(job: "JobConfig") -> str:
    """What the run goes on from, after holding it to this run.

    Raises:
        ValueError: a checkpoint is damaged, of another model or tokenizer, or of a run that this
            configuration cannot resume.
    """
    from megatron_ext.checkpoint.diff import refuse
    from megatron_ext.checkpoint.folder import describe, newest_good, verify
    from megatron_ext.checkpoint.resumable import differences

    found, bad = newest_good(Path(job.folder()) / "checkpoints")
    damaged = f"; {len(bad)} damaged, the newest: {bad[0][1]}" if bad else ""
    if job.checkpoint.load:
        parent = Path(job.checkpoint.load)
        try:
            verify(parent)
        except ValueError as damage:
            raise ValueError(
                f"checkpoint.load={parent} cannot be started from: {damage}. Name a step_* folder "
                f"of a run's checkpoints."
            ) from damage
        if found is None:
            _refuse_other_model(job, parent)
            _refuse_other_tokenizer(job, parent)
    if found is None:
        return f"starts from {job.checkpoint.load or 'nothing'}{damaged}"
    refuse(differences(found, job))
    _refuse_other_tokenizer(job, found)
    return f"goes on from step {describe(found).get('step')} ({found.name}){damaged}"


def _refuse_other_model(job: "JobConfig", path: Path) -> None:
    from megatron_ext.checkpoint.resumable import stored_run
    from megatron_ext.models.config import ModelConfig

    known = {field.name for field in fields(ModelConfig)}
    stored = {key: value for key, value in stored_run(path)["model"].items() if key in known}
    there, here = _tensors(ModelConfig(**stored)), _tensors(job.model)
    for name, value in here.items():
        if value != there[name]:
            raise ValueError(
                f"model.{name}={value} is not what checkpoint.load={path} was trained with "
                f"(model.{name}={there[name]}): load a checkpoint of this model, or set it so."
            )


def _tensors(model: "ModelConfig") -> dict[str, Any]:
    """What the stored tensors and their meaning follow from, defaults filled in."""
    names = (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "vocab_size",
        "normalization",
        "add_qkv_bias",
        "untie_embeddings_and_output_weights",
        "norm_head",
    )
    return {name: getattr(model, name) for name in names} | {
        "num_query_groups": model.query_groups(),
        "kv_channels": model.head_dim(),
    }


def _refuse_other_tokenizer(job: "JobConfig", path: Path) -> None:
    from megatron_ext.checkpoint.folder import describe
    from megatron_ext.digest import sha256_of

    given, stored = job.data.tokenizer.path, describe(path).get("tokenizer_sha256")
    if given and stored and Path(given).is_file() and sha256_of(Path(given)) != stored:
        raise ValueError(
            f"data.tokenizer.path={given} is not the tokenizer that {path} was trained with "
            f"(sha256 {stored[:12]}...): token numbers would mean other words."
        )
