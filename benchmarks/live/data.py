"""Texts that the live benchmark's candidates are pre-trained on, and the three tasks they are fine-tuned on.

Everything comes from what benchmarks/demo/make_data.py prepares (novels, the Bible, a lexicon, WordNet definitions) and
from Debian's package lists. Novels are parted: even chapters are for pre-training, odd ones for the task.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))  # the scripts are run by path

from make_data import DEMO, read_texts

TASKS = ("definitions", "packages", "novels")
TEXTS = ("novels", "bible", "lexicon")
LINES = 6_000  # samples of each task: 3,200 to train on, and those set aside


@dataclasses.dataclass(frozen=True)
class Source:
    """Where texts and tasks come from: the real ones below `work`, or for trying out WordNet's definitions for all."""

    work: Path
    smoke: bool = False

    def text(self, name: str) -> list[str]:
        """Documents to pre-train on."""
        if self.smoke:
            return [row["definition"] for row in _wordnet()[4_000 + 1_000 * TEXTS.index(name) :][:1_000]]
        documents = read_texts(self.work, name, "train")
        return documents[::2] if name == "novels" else documents

    def task(self, name: str, fits: Callable[[str], bool]) -> Path:
        """Return the file of a task's samples (input, target), made if it is not there of those whose input fits."""
        path = self.work / "tasks" / f"{name}.jsonl"
        if not path.exists():
            makers: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
                "definitions": lambda: ((row["word"], row["definition"]) for row in _wordnet()),
                "packages": lambda: packages(self.work),
                "novels": self.sentences,
            }
            maker = makers["definitions"] if self.smoke else makers[name]
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [json.dumps({"input": a, "target": b}) for a, b in maker() if fits(a)][:LINES]
            path.write_text("\n".join(rows) + "\n")
        return path

    def sentences(self) -> Iterator[tuple[str, str]]:
        """Yield pairs of neighbouring sentences of the odd chapters."""
        for chapter in read_texts(self.work, "novels", "train")[1::2]:
            for paragraph in chapter.splitlines():
                parts = re.split(r"(?<=[.!?])\s+(?=[A-Z\"])", paragraph)
                for first, second in zip(parts[::2], parts[1::2], strict=False):
                    if 20 <= len(first) <= 240 and 20 <= len(second) <= 240:
                        yield first, second


def _wordnet() -> list[dict[str, str]]:
    return [json.loads(line) for line in (DEMO / "wordnet_definitions.jsonl").read_text("utf-8").splitlines()]


def packages(work: Path) -> Iterator[tuple[str, str]]:
    """Yield (first paragraph of a Debian package's description, its synopsis).

    The descriptions are fetched by `apt-get update` into lists of our own, so that the machine's stay as they are.
    """
    lists = work / "apt"
    if not any(lists.glob("lists/*Translation-en*")):
        for part in ("lists/partial", "cache/archives/partial"):
            (lists / part).mkdir(parents=True, exist_ok=True)
        options = {
            "Acquire::Languages": "en",
            "Acquire::GzipIndexes": "false",
            "Dir::State::Lists": f"{lists}/lists",
            "Dir::Cache": f"{lists}/cache",
        }
        command = ["apt-get", "update", *(part for k, v in options.items() for part in ("-o", f"{k}={v}"))]
        subprocess.run(command, check=True)
    found = sorted(lists.glob("lists/*Translation-en*"))
    if not found:
        raise SystemExit(f"{lists}: apt-get update brought no descriptions (Translation-en).")
    seen = set()
    for path in found:
        stored = path.read_bytes()
        text = (gzip.decompress(stored) if path.suffix == ".gz" else stored).decode("utf-8")
        for entry in text.split("\n\n"):
            match = re.search(r"^Description-en: (.+)\n((?: .+\n?)+)", entry, re.MULTILINE)
            if match is None:
                continue
            synopsis, body = match.group(1).strip(), re.split(r"\n \.\n", match.group(2))[0]
            words = " ".join(body.split())
            if synopsis not in seen and 40 <= len(words) <= 320 and 10 <= len(synopsis) <= 120:
                seen.add(synopsis)
                yield words, synopsis
