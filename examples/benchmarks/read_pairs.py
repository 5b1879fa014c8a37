"""Reading pairs: rows per second and peak memory, compared with the tokenizer alone.

    python examples/benchmarks/read_pairs.py --rows 1000000
    python examples/benchmarks/read_pairs.py --pairs pairs.parquet --tokenizer Qwen/Qwen2.5-0.5B

Without --pairs, the pairs are problems of the demo's task, tokenised with its tokenizer. With it,
the file's pairs are repeated under numbered prompts. Every reading runs in a separate process, so
that its peak memory can be measured.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import polars as pl

HERE = Path(__file__).parent


def write_rows(path: Path, count: int, pairs: str | None) -> None:
    """Write a JSON Lines file of `count` distinct pairs."""
    if pairs is not None:
        table = pl.read_parquet(pairs).select("prompt", "chosen", "rejected").drop_nulls()
        # the number in front makes repeated prompts distinct
        given = table.to_dicts()
        rows = ({**given[i % len(given)], "prompt": f"{i}. {given[i % len(given)]['prompt']}",
                 "margin": i % 7} for i in range(count))  # fmt: skip
    else:
        rows = ({"prompt": f"{i}*3+{i % 97}?", "chosen": f"{i}*3={i * 3},{i * 3}+{i % 97}=",
                 "rejected": f"{i}+3={i + 3}", "margin": i % 7} for i in range(count))  # fmt: skip
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def load_tokenizer(name: str | None) -> Any:
    """Load the tokenizer with this name, or build the demo's if None."""
    if name is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.eos_token = tokenizer.eos_token or "<|endoftext|>"
        return tokenizer
    sys.path.insert(0, str(HERE.parent))
    from arithmetic import build_tokenizer

    return build_tokenizer()


def peak_memory() -> float:
    """Return the largest resident size of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_reading(name: str, path: Path, cache: Path, tokenizer: Any) -> dict[str, float]:
    """Measure seconds and memory of one reading, in this process."""
    from sage_select import PreferenceDataset

    before, start = peak_memory(), time.perf_counter()
    if name == "tokenizer alone":
        count, texts = 0, []
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                prompt = row["prompt"]
                texts += [prompt, prompt + row["chosen"], prompt + row["rejected"]]
                count += 1
                if len(texts) >= 3072:
                    tokenizer(texts, return_attention_mask=False)
                    texts = []
        if texts:
            tokenizer(texts, return_attention_mask=False)
    else:
        dataset = PreferenceDataset.read(path, tokenizer=tokenizer, max_length=2048, cache=cache)
        count = len(dataset)
        if name == "all tokens read":  # the tokens are memory-mapped, so touch all of them
            int(dataset.num_tokens.sum())
            for start_row in range(0, count, 1000):
                dataset.take(range(start_row, min(start_row + 1000, count))).sequences()
    return {"seconds": time.perf_counter() - start, "rows": count, "memory": peak_memory() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--pairs", help="a Parquet file with prompt, chosen and rejected")
    parser.add_argument("--tokenizer", help="a folder or hub name; by default the demo's")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # one reading, in a subprocess
    args = parser.parse_args()
    if args.one:
        name, path, cache = args.one
        print(
            json.dumps(
                measure_reading(name, Path(path), Path(cache), load_tokenizer(args.tokenizer))
            )
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        path, cache = Path(folder) / "pairs.jsonl", Path(folder) / "cache"
        write_rows(path, args.rows, args.pairs)
        print(f"{args.rows:,} rows, {path.stat().st_size / 1e6:,.0f} MB of JSON Lines")
        print(f"{'':24}{'rows/s':>12}{'x tokenizer':>14}{'memory, MB':>14}")
        tokenizer_seconds = None
        for name in ("tokenizer alone", "first reading", "second reading", "all tokens read"):
            command = [sys.executable, __file__, "--one", name, str(path), str(cache)]
            if args.tokenizer:
                command += ["--tokenizer", args.tokenizer]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            result = json.loads(done.stdout.splitlines()[-1])
            tokenizer_seconds = tokenizer_seconds or result["seconds"]
            print(
                f"{name:24}{result['rows'] / result['seconds']:12,.0f}"
                f"{result['seconds'] / tokenizer_seconds:14.2f}{result['memory']:14,.0f}"
            )
        megabytes = sum(file.stat().st_size for file in cache.glob("*")) / 1e6
        print(f"the cache takes {megabytes:,.0f} MB on disk")


if __name__ == "__main__":
    main()
