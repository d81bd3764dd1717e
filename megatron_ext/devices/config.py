"""Number formats of a run, and which kernels compute it."""

from dataclasses import dataclass

from megatron_ext.legal import unknown_choice

DTYPES = ("bf16", "fp16", "fp32")
FP8_FORMATS = ("e4m3", "hybrid")
FP8_RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
IMPLEMENTATIONS = ("auto", "local", "transformer_engine")
ATTENTION_BACKENDS = ("auto", "flash", "fused", "unfused")


@dataclass(kw_only=True)
class PrecisionConfig:
    """Formats of weights, matmuls and reductions, under Megatron's names. See conf/precision/.

    FP8 reaches the linear layers of the blocks only. What stays high whatever is chosen: embedding,
    output layer and its Norm-Head normalisation, norms, residual stream, softmax and loss,
    optimizer masters and moments (fp32). docs/gpu.md has the table.
    """

    dtype: str = "bf16"
    """Format of weights and activations: ``bf16``, ``fp16`` or ``fp32``. Masters stay fp32."""

    grad_reduce_in_fp32: bool = True
    """Accumulate and reduce gradients in fp32."""

    fp8: str | None = None
    """None is off; ``e4m3`` for all FP8 tensors; ``hybrid`` takes e5m2 for output gradients."""

    fp8_recipe: str = "delayed"
    """Where scales come from: a history (``delayed``), the tensor itself (``tensorwise``), blocks
    of 128 (``blockwise``) or of 32 (``mxfp8``)."""

    fp8_param: bool = False
    """Keep block weights in FP8 and gather them so. Mapped onto Megatron's fields, and refused for
    training: see docs/gpu.md."""

    fp8_margin: int = 0
    """Powers of two kept free above the largest value seen (``delayed`` only)."""

    fp8_amax_history_len: int = 1024
    """Steps whose largest value decides the scale (``delayed`` only)."""

    fp8_amax_compute_algo: str = "max"
    """``max`` of that history, or its ``most_recent`` entry (``delayed`` only)."""

    fp8_wgrad: bool = True
    """False computes weight gradients in ``dtype`` (``delayed`` only)."""

    tp_only_amax_red: bool = False
    """Agree on the largest value over TP (and CP) only, not over data parallelism too."""

    first_last_layers_bf16: bool = False
    """Keep blocks at both ends of the model in bf16, where FP8 hurts most."""

    num_layers_at_start_in_bf16: int = 1
    num_layers_at_end_in_bf16: int = 1

    initial_loss_scale: float = 65536.0
    """Scale that fp16 starts from; halved at an overflow, doubled after ``loss_scale_window``."""

    loss_scale_window: int = 1000
    """Steps without overflow before the fp16 loss scale doubles."""

    def word(self) -> str:
        """The precision's short name, as conf/precision/ has it."""
        if self.fp8 is None:
            return self.dtype
        names = {"delayed": "fp8_delayed", "tensorwise": "fp8_current", "blockwise": "fp8_block"}
        return names.get(self.fp8_recipe, self.fp8_recipe)

    def check(self) -> None:
        """Refuse formats that no table knows, and combinations that Megatron refuses late.

        Raises:
            ValueError: naming the dotted key and the rule.
        """
        if self.dtype not in DTYPES:
            raise unknown_choice("precision.dtype", self.dtype, DTYPES)
        if self.fp8_recipe not in FP8_RECIPES:
            raise unknown_choice("precision.fp8_recipe", self.fp8_recipe, FP8_RECIPES)
        if self.fp8_amax_compute_algo not in ("max", "most_recent"):
            raise unknown_choice(
                "precision.fp8_amax_compute_algo",
                self.fp8_amax_compute_algo,
                ("max", "most_recent"),
            )
        if self.initial_loss_scale < 1 or self.loss_scale_window < 1:
            raise ValueError(
                f"precision.initial_loss_scale={self.initial_loss_scale:g} and "
                f"precision.loss_scale_window={self.loss_scale_window} must be at least 1."
            )
        if self.fp8 is None:
            for key in ("fp8_param", "first_last_layers_bf16"):
                if getattr(self, key):
                    raise ValueError(
                        f"precision.{key}=true needs FP8, and precision.fp8 is null: choose "
                        f"precision=fp8_current, or set precision.{key}=false."
                    )
            return
        self._check_fp8()

    def _check_fp8(self) -> None:
        if self.fp8 not in FP8_FORMATS:
            raise unknown_choice("precision.fp8", self.fp8, FP8_FORMATS)
        if self.dtype != "bf16":
            raise ValueError(
                f"precision.fp8={self.fp8} needs precision.dtype=bf16 for everything that stays "
                f"high, not {self.dtype}."
            )
        if self.fp8_recipe == "delayed":
            if self.first_last_layers_bf16:
                raise ValueError(
                    "precision.first_last_layers_bf16=true cannot be combined with "
                    "precision.fp8_recipe=delayed: leaving FP8 between blocks breaks its history; "
                    "choose precision=fp8_current."
                )
            if self.fp8_amax_history_len < 1:
                raise ValueError(
                    f"precision.fp8_amax_history_len={self.fp8_amax_history_len} must be at least "
                    f"1."
                )
            return
        if self.fp8_margin or not self.fp8_wgrad:
            raise ValueError(
                f"precision.fp8_margin={self.fp8_margin} and precision.fp8_wgrad={self.fp8_wgrad} "
                f"reach precision.fp8_recipe=delayed only, not {self.fp8_recipe}: leave them at 0 "
                f"and true."
            )


@dataclass(kw_only=True)
class KernelsConfig:
    """Which implementation computes the layers. ``auto`` takes the fastest that works here."""

    transformer_impl: str = "auto"
    """``transformer_engine``, ``local`` (torch and SDPA), or ``auto``: the first where it works."""

    attention_backend: str = "auto"
    """Transformer Engine's choice among ``flash`` (flash-attn 2, 3 or 4, the newest installed),
    ``fused`` (cuDNN) and ``unfused`` (torch, the whole score matrix). The local layers use SDPA."""

    gradient_accumulation_fusion: bool | None = None
    """Add weight gradients into the fp32 buffer inside the matmul. Needs apex's extension; None
    uses it where it is installed."""

    def check(self) -> None:
        """Refuse words that no table knows and pairs that contradict each other.

        Raises:
            ValueError: naming the dotted key and the known words.
        """
        if self.transformer_impl not in IMPLEMENTATIONS:
            raise unknown_choice("kernels.transformer_impl", self.transformer_impl, IMPLEMENTATIONS)
        if self.attention_backend not in ATTENTION_BACKENDS:
            raise unknown_choice(
                "kernels.attention_backend", self.attention_backend, ATTENTION_BACKENDS
            )
        if self.transformer_impl == "local" and self.attention_backend != "auto":
            raise ValueError(
                f"kernels.attention_backend={self.attention_backend} chooses among Transformer "
                f"Engine's kernels, and kernels.transformer_impl=local has SDPA only: set one of "
                f"them to auto."
            )
