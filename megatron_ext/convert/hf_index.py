"""Index-1.9B for transformers: Llama whose head rows are normalised. Importing registers it.

    import megatron_ext.convert.hf_index
    model = AutoModelForCausalLM.from_pretrained(folder)

No remote code: the class is this file. A folder written with --fold-norm-head needs none of it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


class IndexConfig(LlamaConfig):
    """Llama's keys, and two more."""

    model_type = "index"
    norm_head: int = 1
    """1 normalises the head's rows in every forward; 0 is a plain head."""

    rope_ratio: float = 1.0
    """Multiplies the RoPE base: 32 for Index-1.9B-32K."""


class IndexRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's RoPE at ``rope_ratio`` times the base."""

    @staticmethod
    def compute_default_rope_parameters(config: IndexConfig, **kwargs) -> tuple[Tensor, float]:
        """Inverse frequencies in fp32, and the attention factor (1)."""
        base = config.rope_parameters["rope_theta"] * config.rope_ratio
        powers = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / base**powers, 1.0


class NormHead(nn.Linear):
    """A linear layer that divides each row of its weight by that row's length, in fp32."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self._unit: tuple[tuple[int, int], Tensor] | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """``hidden [..., in]`` to ``logits [..., out]``."""
        return functional.linear(hidden, self._rows())

    def _rows(self) -> Tensor:
        if torch.is_grad_enabled():
            self._unit = None
            return functional.normalize(self.weight.float(), dim=-1).to(self.weight.dtype)
        key = (self.weight.data_ptr(), self.weight._version)  # changes when the weight does
        if self._unit is None or self._unit[0] != key:
            unit = functional.normalize(self.weight.float(), dim=-1).to(self.weight.dtype)
            self._unit = key, unit
        return self._unit[1]


class IndexForCausalLM(LlamaForCausalLM):
    """Index-1.9B with the raw head that its checkpoints store."""

    config_class = IndexConfig

    def __init__(self, config: IndexConfig) -> None:
        super().__init__(config)
        self.model.rotary_emb = IndexRotaryEmbedding(config)
        if config.norm_head:
            self.lm_head = NormHead(config.hidden_size, config.vocab_size)
        self.post_init()


AutoConfig.register("index", IndexConfig, exist_ok=True)
AutoModelForCausalLM.register(IndexConfig, IndexForCausalLM, exist_ok=True)
