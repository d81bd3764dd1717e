"""How a job's ranks are shared out between the parallel axes."""

from dataclasses import dataclass, field

from megatron_ext.legal import divisors, nearest


@dataclass(kw_only=True)
class ParallelConfig:
    """Size of each axis, under Megatron's own names. Data parallelism takes what is left."""

    tensor_model_parallel_size: int = 1
    """Ranks that split each layer's weights (TP). Best kept inside one node."""

    pipeline_model_parallel_size: int = 1
    """Ranks that each hold a run of consecutive layers (PP)."""

    virtual_pipeline_model_parallel_size: int | None = None
    """Chunks of layers per pipeline rank (VPP): shrinks the bubble, costs memory and messages."""

    num_layers_in_first_pipeline_stage: int | None = None
    """Layers of the first stage when it is to be lighter than the rest; None splits evenly."""

    num_layers_in_last_pipeline_stage: int | None = None
    """Layers of the last stage, which also computes the logits; None splits evenly."""

    context_parallel_size: int = 1
    """Ranks that each hold a slice of every sequence (CP). Needs Transformer Engine."""

    sequence_parallel: bool = False
    """Split activations between TP regions along the sequence too. Needs TP > 1."""

    use_distributed_optimizer: bool = False
    """Share optimizer state over the data-parallel ranks (ZeRO-1): 6 + 12/d bytes a parameter."""

    recompute_granularity: str | None = None
    """None keeps activations, ``selective`` recomputes attention, ``full`` whole layers."""

    recompute_num_layers: int = 1
    """Layers per recomputed block when ``recompute_granularity`` is ``full``."""

    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    """What ``selective`` recomputes: ``core_attn``, ``layernorm``, ``mlp``."""

    overlap_grad_reduce: bool = False
    """Reduce gradients bucket by bucket during the backward pass."""

    overlap_param_gather: bool = False
    """Gather parameters during the next forward pass. Needs the distributed optimizer."""

    tp_comm_overlap: bool = False
    """Cut TP's gathers and scatters into pieces that travel while the matmul computes."""

    overlap_p2p_comm: bool = True
    """Send between pipeline stages while computing. Takes effect with interleaving (VPP)."""

    cp_comm_type: str = "p2p"
    """How context-parallel ranks meet: a ring (``p2p``), ``all_gather``, or ``a2a`` over heads."""

    order: str = "tp-cp-ep-dp-pp"
    """Axes from nearest ranks to farthest. ``tp-cp-ep-pp-dp`` keeps a pipeline inside a node."""

    use_sharp: bool = False
    """Let InfiniBand switches reduce for the data-parallel group (NVIDIA SHARP)."""

    nccl_communicator_config_path: str = ""
    """Megatron's YAML of NCCL settings per group (``cga_cluster_size``, ``max_ctas``, ...)."""

    manual_gc_interval: int = 0
    """Collect Python garbage every this many steps on all ranks at once, instead of whenever one
    rank's counters say so; 0 leaves it to Python."""

    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model between them: TP x PP x CP."""
        tp, pp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        return tp * pp * self.context_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model that ``world_size`` ranks train at once.

        Raises:
            ValueError: the world size is not a multiple of TP x PP x CP.
        """
        tp, pp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        ranks = self.model_parallel_size()
        if world_size % ranks:
            raise ValueError(
                f"world size {world_size} is not a multiple of tp*pp*cp = "
                f"{tp}*{pp}*{self.context_parallel_size} = {ranks}: start a multiple of {ranks} "
                f"ranks (launch.nproc or slurm.nodes), or set {self._smaller(world_size)}."
            )
        return world_size // ranks

    def _smaller(self, world_size: int) -> str:
        """One axis at a time, its nearest sizes at which a world holds whole model copies."""
        words = []
        for axis in ("tensor_model", "pipeline_model", "context"):
            size = getattr(self, f"{axis}_parallel_size")
            others = self.model_parallel_size() // size
            if size > 1 and world_size % others == 0:
                legal = nearest(divisors(world_size // others), size)
                words.append(f"parallel.{axis}_parallel_size to {legal}")
        return ", or ".join(words) or "smaller parallel.*_parallel_size"

    def layers_per_stage(self, num_layers: int) -> list[int]:
        """Layers on each pipeline stage, first to last.

        Raises:
            ValueError: the layers do not divide over the stages (and their virtual chunks).
        """
        stages = self.pipeline_model_parallel_size
        first, last = (
            self.num_layers_in_first_pipeline_stage,
            self.num_layers_in_last_pipeline_stage,
        )
        rest, middle = num_layers - (first or 0) - (last or 0), stages
        middle -= (first is not None) + (last is not None)
        if middle < 0 or rest < 0 or (middle == 0 and rest):
            raise ValueError(
                f"parallel.num_layers_in_first/last_pipeline_stage={first}/{last} leave {rest} of "
                f"model.num_layers={num_layers} layers for {middle} middle stages."
            )
        if middle and rest % middle:
            ends, kind = stages - middle, "middle " if stages > middle else ""
            legal = nearest([size + ends for size in divisors(rest)], stages)
            raise ValueError(
                f"model.num_layers={num_layers} does not divide over "
                f"parallel.pipeline_model_parallel_size={stages} stages "
                f"({rest} layers / {middle} {kind}stages): use {legal} stages, or set "
                f"parallel.num_layers_in_{'last' if first is not None else 'first'}_pipeline_stage."
            )
        each = rest // middle if middle else 0
        layers = [first] if first is not None else []
        layers += [each] * middle
        layers += [last] if last is not None else []
        chunks = self.virtual_pipeline_model_parallel_size or 1
        if any(n % chunks for n in layers):
            raise ValueError(
                f"parallel.virtual_pipeline_model_parallel_size={chunks} does not divide the "
                f"{layers} layers of the stages: use {nearest(divisors(each), chunks)}."
            )
        return layers

    def check(self) -> None:
        """Refuse sizes that no model could use.

        Raises:
            ValueError: naming the dotted key, the rule and the way out.
        """
        for axis in ("tensor_model", "pipeline_model", "context"):
            size = getattr(self, f"{axis}_parallel_size")
            if size < 1:
                raise ValueError(f"parallel.{axis}_parallel_size={size} must be at least 1.")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError(
                "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size of at "
                "least 2 (it is 1): set parallel.sequence_parallel=false, or raise TP."
            )
        chunks = self.virtual_pipeline_model_parallel_size
        if chunks is not None and chunks < 1:
            raise ValueError(
                f"parallel.virtual_pipeline_model_parallel_size={chunks} must be at least 1, or "
                f"null for no interleaving."
            )
        if self.virtual_pipeline_model_parallel_size and self.pipeline_model_parallel_size == 1:
            raise ValueError(
                f"parallel.virtual_pipeline_model_parallel_size="
                f"{self.virtual_pipeline_model_parallel_size} needs "
                f"parallel.pipeline_model_parallel_size of at least 2 (it is 1)."
            )
        if self.overlap_param_gather and not self.use_distributed_optimizer:
            raise ValueError(
                "parallel.overlap_param_gather=true needs parallel.use_distributed_optimizer=true."
            )
        if self.recompute_granularity not in (None, "selective", "full"):
            raise ValueError(
                f"parallel.recompute_granularity={self.recompute_granularity} is not one of null, "
                f"selective, full."
            )
