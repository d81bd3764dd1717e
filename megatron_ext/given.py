"""What a recipe leaves to the person who runs it: the text, and what a later stage starts from."""

from megatron_ext.config import RunConfig


def check_given(run: RunConfig) -> None:
    """Refuse to start a run whose corpora or parent checkpoint were not given.

    Raises:
        ValueError: naming the dotted keys and how to give them, or how to do without.
    """
    check_parent(run)
    if run.data.synthetic:
        return
    used = {name for phase in run.phases for name in (*phase.mixture, *phase.mixture_end)}
    missing = [
        name
        for name, source in run.data.sources.items()
        if not source.path and (name in used or not used)
    ]
    if missing:
        keys = ", ".join(f"data.sources.{name}.path" for name in missing)
        raise ValueError(
            f"{keys} {'is' if len(missing) == 1 else 'are'} not given: this recipe names text by "
            f"its role; give each the prefix of a .bin/.idx pair (tools.prepare writes them), or "
            f"try scale=proxy, which reads the quickstart corpus."
        )


def check_parent(run: RunConfig) -> None:
    """Refuse to start a continued stage from nothing.

    Raises:
        ValueError: naming the key of the parent checkpoint, and how to do without.
    """
    if run.checkpoint.parent and not run.checkpoint.load:
        raise ValueError(
            f"checkpoint.load is empty, but this recipe continues {run.checkpoint.parent}: give "
            f"checkpoint.load=PATH, or checkpoint.parent='' to start from fresh weights."
        )
