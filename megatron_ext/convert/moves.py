"""A conversion as a list: every Megatron tensor, layer by layer, and the rows it is made of."""

from dataclasses import dataclass
from fnmatch import fnmatch

from megatron_ext.convert.families import FAMILIES, rules_of
from megatron_ext.convert.rules import Piece, Rule
from megatron_ext.convert.stored import Stored
from megatron_ext.models.config import ModelConfig


@dataclass(frozen=True)
class Move:
    """One Megatron tensor and its pieces, layer number filled in."""

    rule: Rule
    layer: int | None
    name: str
    """Megatron's parameter name, layer number included."""

    shape: tuple[int, ...]
    """Vocabulary unpadded."""

    pieces: tuple[Piece, ...]

    @property
    def key(self) -> str:
        """Name in a distributed checkpoint, where the layers of one kind share a key."""
        return self.rule.megatron.replace(".{i}", "")

    def sources(self) -> list[str]:
        """Hugging Face tensors, in order."""
        return list(dict.fromkeys(piece.name for piece in self.pieces))


def moves(model: ModelConfig) -> list[Move]:
    """The whole conversion of a shape, in the order of Hugging Face's own files."""
    before: list[Rule] = []
    layers: list[Rule] = []
    after: list[Rule] = []
    for rule in rules_of(model):
        if "{i}" in rule.megatron:
            layers.append(rule)
        else:
            (after if layers else before).append(rule)
    plan = [_move(rule, None, model) for rule in before]
    plan += [_move(rule, i, model) for i in range(model.num_layers) for rule in layers]
    return plan + [_move(rule, None, model) for rule in after]


def _move(rule: Rule, layer: int | None, model: ModelConfig) -> Move:
    pieces = tuple(
        Piece(_fill(piece.name, layer), piece.source_row, piece.row, piece.rows)
        for piece in rule.pieces(model)
    )
    return Move(rule, layer, _fill(rule.megatron, layer), rule.shape(model), pieces)


def _fill(name: str, layer: int | None) -> str:
    return name if layer is None else name.replace("{i}", str(layer))


def source_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of a shape and its size, in the order of its files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for move in moves(model):
        for name, shape in move.rule.parts(model).items():
            shapes[_fill(name, move.layer)] = shape
    return shapes


def match(
    tensors: dict[str, Stored], model: ModelConfig
) -> tuple[dict[str, Stored], dict[str, str]]:
    """The stored tensor of every name the table reads, and the ones left out with the reason.

    Raises:
        ValueError: a tensor is missing, has another size, or is read by no rule.
    """
    left, found = dict(tensors), {}
    shapes = source_shapes(model)
    for move in moves(model):
        for name in move.sources():
            also = [_fill(alias, move.layer) for alias in move.rule.also]
            stored = next((n for n in (name, *also) if n in left), None)
            if stored is None:
                raise ValueError(
                    f"{name} is missing, and {move.name} is made of it: the folder does not hold "
                    f"the {model.num_layers}-layer {model.family} that its config.json describes."
                )
            found[name] = left.pop(stored)
            if found[name].shape != shapes[name]:
                raise ValueError(
                    f"{stored} is {list(found[name].shape)}, and config.json makes it "
                    f"{list(shapes[name])}: one of them is of another model."
                )
    return found, _left_out(left, model, found)


def _left_out(
    left: dict[str, Stored], model: ModelConfig, found: dict[str, Stored]
) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for rule in FAMILIES[model.family].ignored:
        pattern = rule.source.replace("{i}", "*")
        reasons |= {name: rule.reason for name in left if fnmatch(name, pattern)}
    tied = "lm_head.weight"
    if tied in left and not model.untie_embeddings_and_output_weights:
        if not same(left[tied], found["model.embed_tokens.weight"]):
            raise ValueError(
                f"config.json says tie_word_embeddings, but {tied} differs from "
                f"model.embed_tokens.weight: set tie_word_embeddings to false."
            )
        reasons[tied] = "tied: the same numbers as model.embed_tokens.weight"
    unread = sorted(set(left) - set(reasons))
    if unread:
        raise ValueError(
            f"{unread[0]} is read by no rule of the {model.family} table"
            f"{f' (nor are {len(unread) - 1} others)' if len(unread) > 1 else ''}: it would be "
            f"lost. Convert a release of a known family, or add a rule."
        )
    return reasons


def same(a: Stored, b: Stored, *, block: int = 64 << 20) -> bool:
    """Whether two stored tensors are equal byte for byte, read in blocks."""
    import torch

    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    step = max(block // max(a.row_bytes, 1), 1)
    for row in range(0, a.shape[0], step):
        rows = min(step, a.shape[0] - row)
        left, right = (torch.empty((rows, *a.shape[1:]), dtype=a.dtype) for _ in range(2))
        a.read_rows(left, row=row)
        b.read_rows(right, row=row)
        if not torch.equal(left.view(torch.uint8), right.view(torch.uint8)):
            return False
    return True
