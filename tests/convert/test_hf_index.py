"""The Index class for transformers, against a dense model written out here on its own."""

import torch
from transformers import AutoModelForCausalLM

from megatron_ext.convert.to_huggingface import to_huggingface
from megatron_ext.convert.to_megatron import to_megatron
from tests.convert.models import make


def dense(weights, ids, *, heads, base, norm_head=True, epsilon=1e-6):
    """Index-1.9B's forward pass by its published formulas, one head and one token at a time."""
    x = weights["model.embed_tokens.weight"][ids]
    length, hidden = x.shape
    size = hidden // heads
    layers = 1 + max(int(name.split(".")[2]) for name in weights if ".layers." in name)

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * weight

    def rotate(x):
        out = torch.empty_like(x)
        for position in range(length):
            for channel in range(size // 2):
                angle = torch.tensor(position * base ** (-2 * channel / size), dtype=x.dtype)
                a, b = x[position, channel], x[position, channel + size // 2]
                out[position, channel] = a * angle.cos() - b * angle.sin()
                out[position, channel + size // 2] = b * angle.cos() + a * angle.sin()
        return out

    for layer in range(layers):
        get = lambda name: weights[f"model.layers.{layer}.{name}.weight"]  # noqa: B023, E731
        y = norm(x, get("input_layernorm"))
        parts = []
        for head in range(heads):
            rows = slice(head * size, (head + 1) * size)
            q, k = (rotate(y @ get(f"self_attn.{p}_proj")[rows].T) for p in "qk")
            v = y @ get("self_attn.v_proj")[rows].T
            scores = q @ k.T / size**0.5
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            parts.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v)
        x = x + torch.cat(parts, -1) @ get("self_attn.o_proj").T
        y = norm(x, get("post_attention_layernorm"))
        gate, up = y @ get("mlp.gate_proj").T, y @ get("mlp.up_proj").T
        x = x + (gate * gate.sigmoid() * up) @ get("mlp.down_proj").T
    x = norm(x, weights["model.norm.weight"])
    head = weights["lm_head.weight"]
    if norm_head:
        head = head / head.pow(2).sum(-1, keepdim=True).sqrt()
    return x @ head.T


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_logits_are_those_of_the_dense_reference(tmp_path):
    model = load(make("index", tmp_path / "hf", num_hidden_layers=2))
    ids = torch.randint(0, 301, (12,), generator=torch.Generator().manual_seed(0))
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    expected = dense(weights, ids, heads=4, base=320000.0)
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_the_head_has_no_part_along_its_rows(tmp_path):
    model = load(make("index", tmp_path / "hf", num_hidden_layers=1)).train()
    ids = torch.arange(20)[None]
    model(ids, labels=ids).loss.backward()
    weight = model.lm_head.weight
    along = (weight.grad * weight).sum(-1) / weight.norm(dim=-1)
    assert weight.grad.norm() > 0.01 and along.abs().max() < 1e-6


def test_a_changed_weight_is_seen_after_evaluation(tmp_path):
    model = load(make("index", tmp_path / "hf", num_hidden_layers=1))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = model(ids).logits
        model.lm_head.weight[3] = -model.lm_head.weight[3]
        after = model(ids).logits
    torch.testing.assert_close(after[..., 3], -before[..., 3])


def test_raw_and_folded_exports_compute_the_same(tmp_path):
    source = make("index", tmp_path / "hf")
    to_megatron(source, tmp_path / "ckpt")
    to_huggingface(tmp_path / "ckpt", tmp_path / "raw")
    to_huggingface(tmp_path / "ckpt", tmp_path / "folded", fold_norm_head=True)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = load(source)(ids).logits
        torch.testing.assert_close(load(tmp_path / "raw")(ids).logits, expected)
        folded = load(tmp_path / "folded")
        torch.testing.assert_close(folded(ids).logits, expected)
    assert type(folded).__name__ == "LlamaForCausalLM"
