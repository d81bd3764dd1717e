"""What a checkpoint that another run goes on from was trained at; read without torch."""

import json
from pathlib import Path

from megatron_ext.checkpoint.folder import describe


def trained_length(path: Path) -> int:
    """Tokens of the sequences that trained it; of a converted model, those it is declared for.

    Raises:
        ValueError: the checkpoint is damaged, or does not say.
        FileNotFoundError: there is none.
    """
    meta = describe(path)
    if "seq_length" in meta:
        return int(meta["seq_length"])
    stored = json.loads((path / "run.json").read_text())
    try:
        return int(stored["model"]["max_position_embeddings"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path / 'run.json'} does not say model.max_position_embeddings."
        ) from error
