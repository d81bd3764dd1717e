"""Rules: which rows of which Hugging Face tensor are which rows of which Megatron tensor.

A rule never holds a weight. Both directions, the size check and the report read the same pieces,
so what goes in is what comes out. ``{i}`` in a name is the layer number.

Megatron keeps attention's three projections in one matrix cut by query group, so that a
tensor-parallel split never separates a key from the queries that read it::

    [q of group 0 | k 0 | v 0 | q of group 1 | k 1 | v 1 | ...]
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_ext.models.config import ModelConfig


@dataclass(frozen=True)
class Piece:
    """``rows`` rows: from ``source_row`` of Hugging Face's ``name`` to ``row`` of Megatron's."""

    name: str
    source_row: int
    row: int
    rows: int


@dataclass(frozen=True)
class Rule(ABC):
    """One line of a table: one Megatron tensor and what it is made of."""

    source: str
    megatron: str
    dims: str = ""
    """Words of ``sizes``: ``vocab hidden``."""

    also: tuple[str, ...] = ()
    """Other names under which releases have stored the Hugging Face tensor."""

    @abstractmethod
    def shape(self, model: ModelConfig) -> tuple[int, ...]:
        """Size of the Megatron tensor, vocabulary unpadded."""

    @abstractmethod
    def parts(self, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Hugging Face names and sizes, ``{i}`` not yet filled in."""

    @abstractmethod
    def pieces(self, model: ModelConfig) -> Iterator[Piece]:
        """Every row of the parts exactly once, in the order of Megatron's rows."""

    def _dims(self, model: ModelConfig) -> tuple[int, ...]:
        size = sizes(model)
        return tuple(size[word] for word in self.dims.split())


def sizes(model: ModelConfig) -> dict[str, int]:
    """What the words of a rule's dimensions mean for one shape."""
    head = model.head_dim()
    return {
        "vocab": model.vocab_size,
        "hidden": model.hidden_size,
        "ffn": model.ffn_hidden_size,
        "query": model.num_attention_heads * head,
        "kv": model.query_groups() * head,
    }


@dataclass(frozen=True)
class Rename(Rule):
    """The same tensor under another name; ``dims`` are all its dimensions."""

    def shape(self, model: ModelConfig) -> tuple[int, ...]:
        return self._dims(model)

    def parts(self, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        return {self.source: self._dims(model)}

    def pieces(self, model: ModelConfig) -> Iterator[Piece]:
        yield Piece(self.source, 0, 0, self._dims(model)[0])


@dataclass(frozen=True)
class FuseQKV(Rule):
    """q, k and v to one tensor, group by group; ``{p}`` is the letter, ``dims`` the columns."""

    def shape(self, model: ModelConfig) -> tuple[int, ...]:
        size = sizes(model)
        return (size["query"] + 2 * size["kv"], *self._dims(model))

    def parts(self, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        size, columns = sizes(model), self._dims(model)
        rows = {"q": size["query"], "k": size["kv"], "v": size["kv"]}
        return {self.source.replace("{p}", p): (n, *columns) for p, n in rows.items()}

    def pieces(self, model: ModelConfig) -> Iterator[Piece]:
        q, k, v = self.parts(model)
        head, groups = model.head_dim(), model.query_groups()
        queries = model.num_attention_heads // groups * head
        row = 0
        for group in range(groups):
            for name, rows in ((q, queries), (k, head), (v, head)):
                yield Piece(name, group * rows, row, rows)
                row += rows


@dataclass(frozen=True)
class FuseGate(Rule):
    """SwiGLU's two inputs to one tensor, ``[gate; up]``; ``{p}`` is the word."""

    def shape(self, model: ModelConfig) -> tuple[int, ...]:
        return (2 * model.ffn_hidden_size, model.hidden_size)

    def parts(self, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        half = (model.ffn_hidden_size, model.hidden_size)
        return {self.source.replace("{p}", word): half for word in ("gate", "up")}

    def pieces(self, model: ModelConfig) -> Iterator[Piece]:
        for number, name in enumerate(self.parts(model)):
            yield Piece(name, 0, number * model.ffn_hidden_size, model.ffn_hidden_size)


@dataclass(frozen=True)
class Ignore:
    """A stored tensor that is not a weight: named in the report and left out, with the reason."""

    source: str
    reason: str
