"""A model's shape and the way it is run, as the few numbers that arithmetic needs."""

from dataclasses import dataclass

from megatron_ext.config import RunConfig
from megatron_ext.models.config import ModelConfig
from megatron_ext.parallel.config import ParallelConfig
from megatron_ext.plan.parameters import layer_matmul_weights

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(kw_only=True, frozen=True)
class Shape:
    """A decoder. Wider than ModelConfig: published tables hold GPT shapes that we do not train."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocab: int
    """Rows of the embedding, padding included."""

    gated: bool = True
    tied: bool = False
    norm_vectors: int = 1
    """Vectors of a norm: 1 for RMSNorm, 2 for LayerNorm with bias."""

    qkv_bias: bool = False
    linear_bias: bool = False
    """Every linear layer has a bias (GPT)."""

    dropout: bool = False
    rotary: bool = True
    positions: int = 0
    """Rows of a learned position table."""

    @staticmethod
    def of(model: ModelConfig, tensor_parallel: int) -> "Shape":
        """The shape of one of our models, its vocabulary padded for ``tensor_parallel``."""
        return Shape(
            layers=model.num_layers,
            hidden=model.hidden_size,
            ffn=model.ffn_hidden_size,
            heads=model.num_attention_heads,
            groups=model.query_groups(),
            head_dim=model.head_dim(),
            vocab=model.padded_vocab(tensor_parallel),
            tied=not model.untie_embeddings_and_output_weights,
            norm_vectors=2 if model.normalization == "LayerNorm" else 1,
            qkv_bias=model.add_qkv_bias,
        )

    def layer_matmul(self) -> int:
        """Multiplied weights of one layer."""
        return layer_matmul_weights(
            hidden=self.hidden,
            ffn=self.ffn,
            heads=self.heads,
            groups=self.groups,
            head_dim=self.head_dim,
            gated=self.gated,
        )


@dataclass(kw_only=True, frozen=True)
class Layout:
    """How a shape is spread over ranks and fed."""

    world_size: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    micro_batch: int = 1
    global_batch: int
    seq_length: int
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    recompute: str | None = None
    """None, ``selective`` or ``full``."""

    recompute_layers: int = 1
    """Layers per block of full recomputation."""

    recompute_modules: tuple[str, ...] = ("core_attn",)
    """What selective recomputation recomputes: ``core_attn``, ``layernorm``, ``mlp``."""

    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    ends_are_layers: bool = False
    """Embedding and loss each take the place of one layer (Megatron's account_for_* switches)."""

    dtype: str = "bf16"
    fp8: str | None = None
    """Recipe of the block linears, or None."""

    fp8_weights: bool = False
    """Block weights are kept and gathered in FP8."""

    fp32_gradients: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    tp_comm_overlap: bool = False
    """Collectives of TP run in pieces beside their matmul (Transformer Engine user buffers)."""

    flash_attention: bool = True
    fused_kernels: bool = True
    """Norms, rotary positions and SwiGLU are one kernel each, not a chain of element-wise ones."""

    @property
    def dp(self) -> int:
        """Copies of the model, context-parallel ranks of one copy counted once."""
        return self.world_size // (self.tp * self.pp * self.cp)

    @property
    def shards(self) -> int:
        """Ranks that share optimizer state: data and context parallel together."""
        return self.dp * self.cp

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one step on one pipeline."""
        return self.global_batch // (self.dp * self.micro_batch)

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch on one context-parallel rank."""
        return self.micro_batch * self.seq_length // self.cp

    @staticmethod
    def of(run: RunConfig, world_size: int, *, fused_kernels: bool = True) -> "Layout":
        """The layout of a run on ``world_size`` ranks, at its first phase's batch and length.

        Raises:
            ValueError: the world size does not hold a whole number of model copies.
        """
        run.parallel.data_parallel_size(world_size)
        parallel, precision, phase = run.parallel, run.precision, run.phases[0]
        return Layout(
            world_size=world_size,
            tp=parallel.tensor_model_parallel_size,
            pp=parallel.pipeline_model_parallel_size,
            vpp=parallel.virtual_pipeline_model_parallel_size or 1,
            cp=parallel.context_parallel_size,
            micro_batch=run.batch.micro_batch_size,
            global_batch=phase.global_batch_size or run.batch.global_batch_size,
            seq_length=phase.seq_length or run.batch.seq_length,
            sequence_parallel=parallel.sequence_parallel,
            distributed_optimizer=parallel.use_distributed_optimizer,
            recompute=parallel.recompute_granularity,
            recompute_layers=parallel.recompute_num_layers,
            recompute_modules=tuple(parallel.recompute_modules),
            first_stage_layers=parallel.num_layers_in_first_pipeline_stage,
            last_stage_layers=parallel.num_layers_in_last_pipeline_stage,
            dtype=precision.dtype,
            fp8=precision.fp8_recipe if precision.fp8 else None,
            fp8_weights=bool(precision.fp8) and precision.fp8_param,
            fp32_gradients=precision.grad_reduce_in_fp32,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            tp_comm_overlap=parallel.tp_comm_overlap,
            fused_kernels=fused_kernels,
        )

    def chunk_layers(self, layers: int) -> list[list[int]]:
        """Layers of each stage's chunks: ``[stage][chunk]``.

        Raises:
            ValueError: the layers do not divide over the stages and chunks.
        """
        if self.ends_are_layers:
            return _with_ends(layers, self.pp, self.vpp)
        stages = ParallelConfig(
            pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.vpp if self.vpp > 1 else None,
            num_layers_in_first_pipeline_stage=self.first_stage_layers,
            num_layers_in_last_pipeline_stage=self.last_stage_layers,
        ).layers_per_stage(layers)
        return [[stage // self.vpp] * self.vpp for stage in stages]


def _with_ends(layers: int, pp: int, vpp: int) -> list[list[int]]:
    each, left = divmod(layers + 2, pp * vpp)
    if left:
        raise ValueError(
            f"model.num_layers={layers} + 2 ends does not divide over {pp} stages x {vpp} chunks."
        )
    chunks = [[each] * vpp for _ in range(pp)]
    chunks[0][0] -= 1
    chunks[-1][-1] -= 1
    return chunks
