"""Conversations beside plain text of the same words: `gpt prepare`, and training on packed rows.

    python benchmarks/chat.py [--rounds 5] [--megabytes 24]

Prepared are rows of one jsonl file, `messages` and then the same text under `text`, with GPT-2's
tokenizer. Trained is the quickstart's network, without what it adds to GPT-2, on stdlib-chat in
packed rows and as one plain text of the same tokens; a row's padding counts as tokens, as it does
in `gpt train`. Whole processes, in turn; the rate is the median over steps after the first three.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from common import GPT, Report, run, stdlib_text

STEPS, FIRST = 12, 3
SHAPE = ("n_layer=4", "n_head=4", "n_embd=256", "block_size=512")


def main() -> None:
    """Measure both and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=24)
    options = parser.parse_args()
    report = Report("Conversations beside plain text")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder, options.megabytes * 1_000_000)
        found: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            for form in ("plain", "chat"):
                seconds = run([*GPT, "prepare", f"./{form}.jsonl", "--force", "--out", form],
                              folder).seconds  # fmt: skip
                found.setdefault(f"prepare, {form}", []).append(options.megabytes / seconds)
        texts = folder / "texts.jsonl"
        run([*GPT, "prepare", "stdlib-chat", "--out", "packed"], folder)
        run([*GPT, "prepare", f"./{texts.name}", "--out", "windows"], folder)
        for _ in range(options.rounds):
            for data in ("windows", "packed"):
                found.setdefault(f"train, {data}", []).append(trained(folder, data))
    for label, values in found.items():
        unit = "MB/s" if label.startswith("prepare") else "tokens/s"
        spread = f"({min(values):,.1f} to {max(values):,.1f})"
        report.line(f"{label:<16} {statistics.median(values):8,.1f} {unit}  {spread}")
    for one, other in (("prepare, chat", "prepare, plain"), ("train, packed", "train, windows")):
        ratio = statistics.median(found[one]) / statistics.median(found[other])
        report.line(f"{one} / {other}: {ratio:.2f}")
    report.save()


def write_rows(folder: Path, n_bytes: int) -> None:
    """Write the same words as conversations of two turns and as texts."""
    text = stdlib_text(4_000_000)
    pieces = [text[at : at + 400].strip() for at in range(0, len(text), 400)]
    with (folder / "plain.jsonl").open("w") as plain, (folder / "chat.jsonl").open("w") as chat:
        written = at = 0
        while written < n_bytes:
            ask, answer = (pieces[(at + i) % len(pieces)] or "pass" for i in range(2))
            messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
            print(json.dumps({"messages": messages}), file=chat)
            print(json.dumps({"text": f"{ask}\n{answer}"}), file=plain)
            written, at = written + len(ask) + len(answer), at + 2
    with (folder / "texts.jsonl").open("w") as file:
        for at in range(0, 2_000_000, 400):
            print(json.dumps({"text": text[at : at + 400]}), file=file)


def trained(folder: Path, data: str) -> float:
    """Return the median rate of a few steps."""
    settings = [f"data.dir={data}", "run_dir=run", "device=cpu", f"train.max_steps={STEPS}",
                "train.micro_batch_size=4", "train.eval_every=1000000", "train.log_every=1",
                "train.eval_tokens=2048", "generate.max_new_tokens=1",
                *(f"model.{one}" for one in SHAPE)]  # fmt: skip
    words = [word for setting in settings for word in ("-s", setting)]
    run([*GPT, "train", "--overwrite", *words], folder)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line).get("tokens_per_second") for line in lines]
    return float(statistics.median([rate for rate in rates if rate][FIRST:]))


if __name__ == "__main__":
    main()
