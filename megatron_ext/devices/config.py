"""Number formats of a run."""

from dataclasses import dataclass

from megatron_ext.legal import unknown_choice


@dataclass(kw_only=True)
class PrecisionConfig:
    """Formats of weights, matmuls and reductions. Choices: conf/precision/."""

    dtype: str = "bf16"
    """Format of weights and activations: ``bf16``, ``fp16`` or ``fp32``. Masters stay fp32."""

    grad_reduce_in_fp32: bool = True
    """Accumulate and reduce gradients in fp32."""

    def check(self) -> None:
        """Refuse a format that no table knows.

        Raises:
            ValueError: naming the dotted key and the known words.
        """
        if self.dtype not in ("bf16", "fp16", "fp32"):
            raise unknown_choice("precision.dtype", self.dtype, ("bf16", "fp16", "fp32"))
