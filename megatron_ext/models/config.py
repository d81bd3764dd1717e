"""The shape of a model, under Megatron's own names."""

from dataclasses import dataclass

from megatron_ext.legal import divisors, nearest, nearest_multiples, unknown_choice
from megatron_ext.parallel.config import ParallelConfig

FAMILIES = ("index", "llama", "skywork", "stablelm")


@dataclass(kw_only=True)
class ModelConfig:
    """A pre-norm decoder with SwiGLU and rotary positions, as every system here is.

    Dropout is 0 everywhere and linear layers other than QKV have no bias: no published system
    of ours trains otherwise, so there is no setting for it.
    """

    family: str = "llama"
    """Which conversion table and Hugging Face class the model belongs to."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Width of one half of the SwiGLU: ``linear_fc1`` has twice as many rows."""

    num_attention_heads: int

    num_query_groups: int | None = None
    """KV heads (GQA). None gives every query head its own."""

    kv_channels: int | None = None
    """Size of one head; None is hidden_size / num_attention_heads."""

    vocab_size: int
    """True vocabulary: rows that are exported. The padding below never leaves a checkpoint."""

    make_vocab_size_divisible_by: int = 128
    """Embedding rows are padded to a multiple of this times TP."""

    padded_vocab_size: int | None = None
    """Embedding rows, when they must have one exact number; None pads by the rule above."""

    max_position_embeddings: int = 4096
    """Longest sequence the model is declared for. Written to exports; not a table size."""

    normalization: str = "RMSNorm"
    """``RMSNorm``, or ``LayerNorm`` with bias."""

    layernorm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    """RoPE theta. A phase may raise it (adjusted base frequency, ABF)."""

    rotary_percent: float = 1.0
    """Share of each head's channels that rotate (0.25 for StableLM-2)."""

    add_qkv_bias: bool = False
    untie_embeddings_and_output_weights: bool = True

    norm_head: bool = False
    """Rows of the output layer are L2-normalised in every forward (Index-1.9B)."""

    norm_head_gradient: str = "attached"
    """``attached``: the gradient flows through the norm. ``detached``: the norm is a constant."""

    z_loss_coefficient: float = 0.0
    """Weight of the squared log-sum-exp of the logits (PaLM, arXiv:2204.02311). 0 is off."""

    init_method_std: float = 0.02
    scaled_output_init: bool = True
    """Initialise residual-output layers at ``init_method_std / sqrt(2 * num_layers)``."""

    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    def query_groups(self) -> int:
        """KV heads."""
        return self.num_query_groups or self.num_attention_heads

    def padded_vocab(self, tensor_model_parallel_size: int) -> int:
        """Embedding rows at this TP, padding included."""
        if self.padded_vocab_size is not None:
            return self.padded_vocab_size
        multiple = self.make_vocab_size_divisible_by * tensor_model_parallel_size
        return -(-self.vocab_size // multiple) * multiple

    def check(self, parallel: ParallelConfig) -> None:
        """Refuse a shape that cannot be built, or not under ``parallel``.

        Raises:
            ValueError: naming the dotted key, the arithmetic and the nearest legal values.
        """
        self._check_words()
        self._check_heads()
        tp = parallel.tensor_model_parallel_size
        for key in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
            size = self.query_groups() if key == "num_query_groups" else getattr(self, key)
            if size % tp:
                raise ValueError(
                    f"model.{key}={size} is not a multiple of "
                    f"parallel.tensor_model_parallel_size={tp} ({size} / {tp} = {size / tp:.2f}): "
                    f"use a tensor_model_parallel_size of {nearest(divisors(size), tp)}."
                )
        rows = self.padded_vocab(tp)
        if rows < self.vocab_size:
            raise ValueError(
                f"model.padded_vocab_size={rows} is smaller than model.vocab_size="
                f"{self.vocab_size}: leave it null to pad by model.make_vocab_size_divisible_by."
            )
        if rows % tp:
            raise ValueError(
                f"model.padded_vocab_size={rows} is not a multiple of "
                f"parallel.tensor_model_parallel_size={tp}: use {nearest_multiples(tp, rows)}, or "
                f"leave it null to pad model.vocab_size={self.vocab_size} automatically."
            )
        parallel.layers_per_stage(self.num_layers)

    def _check_words(self) -> None:
        if self.family not in FAMILIES:
            raise unknown_choice("model.family", self.family, FAMILIES)
        if self.normalization not in ("RMSNorm", "LayerNorm"):
            raise unknown_choice(
                "model.normalization", self.normalization, ("RMSNorm", "LayerNorm")
            )
        if self.norm_head_gradient not in ("attached", "detached"):
            raise unknown_choice(
                "model.norm_head_gradient", self.norm_head_gradient, ("attached", "detached")
            )
        if self.norm_head and not self.untie_embeddings_and_output_weights:
            raise ValueError(
                "model.norm_head=true needs model.untie_embeddings_and_output_weights=true: a "
                "normalised head cannot share its weight with the embedding."
            )

    def _check_heads(self) -> None:
        for key in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key}={getattr(self, key)} must be at least 1.")
        heads, groups = self.num_attention_heads, self.query_groups()
        if self.kv_channels is None and self.hidden_size % heads:
            raise ValueError(
                f"model.hidden_size={self.hidden_size} is not a multiple of "
                f"model.num_attention_heads={heads}: use "
                f"{nearest(divisors(self.hidden_size), heads)} heads, or set model.kv_channels."
            )
        if heads % groups:
            raise ValueError(
                f"model.num_attention_heads={heads} is not a multiple of "
                f"model.num_query_groups={groups}: use {nearest(divisors(heads), groups)} groups."
            )
        rotary = self.head_dim() * self.rotary_percent
        if not 0 < self.rotary_percent <= 1 or rotary % 2:
            raise ValueError(
                f"model.rotary_percent={self.rotary_percent} rotates {rotary:g} of "
                f"{self.head_dim()} channels a head: that must be an even number above 0."
            )
