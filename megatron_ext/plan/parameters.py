"""How many parameters a model has, counted from its shape."""

from dataclasses import dataclass

from megatron_ext.models.config import ModelConfig


@dataclass(kw_only=True, frozen=True)
class Parameters:
    """Parameters of a model at its true vocabulary, as exported."""

    embedding: int
    """Rows of the input embedding."""

    head: int
    """Rows of the output layer; 0 when it is the embedding."""

    layer_matmul: int
    """Weights of one layer that are multiplied: QKV, projection, SwiGLU."""

    layer_vector: int
    """Norm weights (and biases) and QKV biases of one layer."""

    final_norm: int
    num_layers: int

    @property
    def non_embedding_matmul(self) -> int:
        """Multiplied weights without embedding and head: the count behind "1.9B"."""
        return self.num_layers * self.layer_matmul

    @property
    def non_embedding(self) -> int:
        """Everything but embedding and head."""
        return self.num_layers * (self.layer_matmul + self.layer_vector) + self.final_norm

    @property
    def total(self) -> int:
        """Everything."""
        return self.embedding + self.head + self.non_embedding


def layer_matmul_weights(
    *, hidden: int, ffn: int, heads: int, groups: int, head_dim: int, gated: bool
) -> int:
    """Multiplied weights of one decoder layer."""
    attention = hidden * head_dim * (2 * heads + 2 * groups)
    return attention + hidden * ffn * (3 if gated else 2)


def count_parameters(model: ModelConfig) -> Parameters:
    """Parameters of ``model``; padding rows of the vocabulary are not counted."""
    h, groups, head_dim = model.hidden_size, model.query_groups(), model.head_dim()
    norm = h * (2 if model.normalization == "LayerNorm" else 1)
    bias = head_dim * (model.num_attention_heads + 2 * groups) if model.add_qkv_bias else 0
    rows = model.vocab_size * h
    return Parameters(
        embedding=rows,
        head=rows if model.untie_embeddings_and_output_weights else 0,
        layer_matmul=layer_matmul_weights(
            hidden=h,
            ffn=model.ffn_hidden_size,
            heads=model.num_attention_heads,
            groups=groups,
            head_dim=head_dim,
            gated=True,
        ),
        layer_vector=2 * norm + bias,
        final_norm=norm,
        num_layers=model.num_layers,
    )
