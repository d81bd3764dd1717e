"""What a conversion costs: wall time against `cat` of the same bytes, and peak memory.

    python -m tools.bench.convert [--gigabytes 7] [--pairs 3] [--flush] [--peer]

A synthetic Llama of the asked size (bf16, 4096 wide, 32 heads on 4 KV heads) is converted to a
distributed checkpoint and back by tools.convert in processes of their own, in turn with
`cat input > output`. Both write to the same disk; ours also flushes every byte to it, hashes it
and reads the export back. --flush lets cat's side flush its copy too (`sync FILE`), so that both
end with their bytes on the disk. --peer also times transformers' own load and save of the folder.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from launch.cli import refusing
from tools.bench.pairs import Pairs, interleave, report

WIDTH, FFN, HEADS, GROUPS, VOCAB = 4096, 11008, 32, 4, 64000
PEER = (
    "import sys, resource, torch, transformers; "
    "m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16); "
    "m.save_pretrained(sys.argv[2]); "
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)"
)


def main(argv: list[str] | None = None) -> int:
    """Print both directions with both of their sides."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gigabytes", type=float, default=7.0, help="size of the model")
    parser.add_argument("--pairs", type=int, default=3, help="samples of each side")
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--flush", action="store_true", help="flush cat's copy to disk too")
    parser.add_argument("--peer", action="store_true", help="also time transformers")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        _all(args, Path(folder))
    return 0


def _all(args: argparse.Namespace, folder: Path) -> None:
    size = synthesise(folder / "hf", int(args.gigabytes * 1e9))
    print(f"{size / 1e9:.2f} GB in {len(list((folder / 'hf').glob('*.safetensors')))} files")
    for command, source in (("hf-to-megatron", "hf"), ("megatron-to-hf", "ckpt")):
        reports: list[dict] = []
        pairs = interleave(
            lambda c=command, s=source, r=reports: r.append(_convert(c, folder, s, args.workers)),
            lambda s=source: _cat(folder, s, flush=args.flush),
            pairs=args.pairs,
            warmup=0,
        )
        _print(command, pairs, reports, flush=args.flush)
        if command == "hf-to-megatron":
            _convert(command, folder, "hf", args.workers, keep="ckpt")
    if args.peer:
        _peer(folder, args)


def synthesise(folder: Path, size: int) -> int:
    """A folder of about ``size`` bytes; the numbers are noise. Returns the weights' bytes."""
    import torch

    from megatron_ext.convert.families import parameter_count
    from megatron_ext.convert.hf_config import write_config
    from megatron_ext.convert.huggingface_writer import FolderWriter
    from megatron_ext.convert.moves import source_shapes
    from megatron_ext.models.config import ModelConfig

    def model(layers: int) -> ModelConfig:
        return ModelConfig(
            num_layers=layers,
            hidden_size=WIDTH,
            ffn_hidden_size=FFN,
            num_attention_heads=HEADS,
            num_query_groups=GROUPS,
            vocab_size=VOCAB,
        )

    one, two = (2 * parameter_count(model(n)) for n in (1, 2))
    shape = model(max(1, round((size - one) / (two - one)) + 1))
    folder.mkdir()
    tensors = {name: (dims, torch.bfloat16) for name, dims in source_shapes(shape).items()}
    writer = FolderWriter(folder, tensors)
    noise = torch.randn(1 << 24).bfloat16()
    for name, (dims, dtype) in tensors.items():
        row = max(1, dims[1] if len(dims) == 2 else 1)
        step = noise.numel() // row
        for start in range(0, dims[0], step):
            rows = min(step, dims[0] - start)
            writer.write_rows(name, noise[: rows * row].to(dtype), row=start)
    writer.finish()
    config = write_config(shape, dtype="bfloat16", tokens={})
    (folder / "config.json").write_text(json.dumps(config))
    return 2 * parameter_count(shape)


def _convert(command: str, folder: Path, source: str, workers: int, keep: str = "out") -> dict:
    """One conversion in a process of its own; what its report says."""
    target, note = folder / keep, folder / "report.json"
    if target.exists():
        shutil.rmtree(target)
    words = [sys.executable, "-m", "tools.convert", command, str(folder / source), str(target)]
    words += ["--no-verify", "--workers", str(workers), "--report", str(note)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return json.loads(note.read_text())


def _cat(folder: Path, source: str, *, flush: bool) -> None:
    """`cat input > output` of the same files, and on request the wait for the disk."""
    files = sorted(f for f in (folder / source).iterdir() if f.is_file())
    with open(folder / "copy", "wb") as output:
        subprocess.run(["cat", *map(str, files)], stdout=output, check=True)
    if flush:
        subprocess.run(["sync", str(folder / "copy")], check=True)


def _print(command: str, pairs: Pairs, reports: list[dict], *, flush: bool) -> None:
    peer = "cat input > output; sync output" if flush else "cat input > output"
    report(command, pairs, ours="tools.convert", peer=peer, bar="2.5 wall")
    inside = sorted(r["seconds"] for r in reports)[len(reports) // 2]
    peak = max(r["peak_memory_bytes"] for r in reports)
    largest, whole = reports[0]["largest_tensor_bytes"], reports[0]["bytes"]
    print(
        f"  of ours: {inside:.1f} s converting, the rest starting Python and torch\n"
        f"  peak memory {peak / 2**30:.2f} GiB = largest tensor {largest / 2**30:.2f} GiB + "
        f"{(peak - largest) / 2**30:.2f} GiB (bar: 1.5); {peak / whole:.2f} of the model"
    )


def _peer(folder: Path, args: argparse.Namespace) -> None:
    peaks: list[int] = []

    def load_and_save() -> None:
        words = [sys.executable, "-c", PEER, str(folder / "hf"), str(folder / "peer")]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout.split()[-1]))
        shutil.rmtree(folder / "peer")

    pairs = interleave(
        lambda: _convert("hf-to-megatron", folder, "hf", args.workers),
        load_and_save,
        pairs=args.pairs,
        warmup=0,
    )
    report("beside transformers", pairs, ours="tools.convert", peer="load and save", bar="none")
    print(f"  transformers' peak memory {max(peaks) / 2**30:.2f} GiB")


if __name__ == "__main__":
    sys.exit(refusing(main))
