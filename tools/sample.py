"""Continue a text with a model in Hugging Face's layout, on the CPU.

python -m tools.sample HF_DIR --prompt "The law says" [--tokens 40] [--temperature 0.8]
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from launch.cli import refusing


def main(argv: list[str] | None = None) -> int:
    """Print each prompt with its continuation."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.sample",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("hf_dir", type=Path)
    parser.add_argument("--prompt", action="append", required=True, help="may be given repeatedly")
    parser.add_argument("--tokens", type=int, default=40, help="tokens to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    parser.add_argument("--top-k", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    model, tokenizer = load(args.hf_dir)
    for prompt in args.prompt:
        added = continuation(model, tokenizer, prompt, args=args)
        print(f"{prompt}|{added}")
    return 0


def load(hf_dir: Path) -> tuple[Any, Any]:
    """The model by transformers' own loader, and the tokenizer that was exported beside it.

    Raises:
        FileNotFoundError: the folder holds no model.
    """
    if not (hf_dir / "config.json").exists():
        raise FileNotFoundError(f"{hf_dir} holds no config.json: give a Hugging Face folder")
    import transformers

    import megatron_ext.convert.hf_index  # noqa: F401  registers the raw Norm-Head class
    from megatron_ext.data.tokenizer import load_tokenizer

    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(hf_dir, dtype="float32")
    except OSError as error:
        why = str(error).split("\n")[0]
        raise ValueError(f"{hf_dir} cannot be loaded by transformers: {why}") from error
    return model.eval(), load_tokenizer(_tokenizer_file(hf_dir))


def _tokenizer_file(hf_dir: Path) -> Path:
    for name in ("tokenizer.model", "tokenizer.json"):
        if (hf_dir / name).exists():
            return hf_dir / name
    raise FileNotFoundError(f"{hf_dir} holds neither tokenizer.model nor tokenizer.json")


def continuation(model: Any, tokenizer: Any, prompt: str, *, args: argparse.Namespace) -> str:
    """``args.tokens`` tokens after ``prompt``, as text."""
    import torch

    torch.manual_seed(args.seed)
    ids = torch.tensor([tokenizer.encode(prompt)])
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k}
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=args.tokens,
            pad_token_id=tokenizer.eod_id,
            **(sampling if args.temperature > 0 else {"do_sample": False}),
        )
    return tokenizer.decode(out[0, ids.shape[1] :].tolist())


if __name__ == "__main__":
    sys.exit(refusing(main))
