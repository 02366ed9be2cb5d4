"""Prepare the demo's data: the shipped task sample, and the texts and tokenizer its models are pre-trained with.

    python benchmarks/demo/make_data.py                    # Debian: fetches seven packages with apt-get download
    python benchmarks/demo/make_data.py --packages DIR     # or takes the .deb files from DIR

Written to lensjax/data/demo: wordnet_definitions.jsonl and WORDNET-LICENSE.txt (copied with every model that is
fine-tuned on it). Written to --work: texts/{novels,bible,lexicon}.jsonl (public domain) and tokenizer/.
Nothing is installed: packages are unpacked with dpkg-deb; only /usr/bin/bible of bible-kjv is run, from where it lies,
because it alone reads its compressed text.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

PACKAGES = ("wordnet-base", "r-cran-janeaustenr", "bible-kjv", "bible-kjv-text", "dict-jargon", "dict-devil")
DEMO = Path(__file__).resolve().parents[2] / "lensjax" / "data" / "demo"
WORK = Path(tempfile.gettempdir()) / "lensjax-demo"
SEED = 2025
ROWS = 7_200
LONGEST = 240  # characters of a definition; what is longer might not fit into the models' 128 positions
# 4,096 tokens would shorten a definition by 13 % and double the embedding, more than half of a small model as it is.
VOCABULARY = 2_048
HELD_OUT = 0.05  # share of the documents, not of the tokens
END_OF_TEXT = "<|endoftext|>"
NOVELS = ("emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility")
# WordNet marks these words itself; a demonstration that prints examples can do without them.
UNWELCOME = re.compile(r"\b(slurs?|obscen\w*|offensive\w*|vulgar\w*|disparag\w*|derogat\w*|insulting)\b")
ASCII = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "–": "-", "…": "...", "□": "-", "\xa0": " "})


def unpack(packages: Path | None, into: Path) -> Path:
    """Unpack the Debian packages below `into`, fetching them first unless they lie in `packages`."""
    root = into / "root"
    root.mkdir(parents=True, exist_ok=True)
    if packages is None:
        packages = into / "debs"
        packages.mkdir(parents=True, exist_ok=True)
        missing = [name for name in PACKAGES if not any(packages.glob(f"{name}_*.deb"))]
        if missing:
            subprocess.run(["apt-get", "download", *missing], cwd=packages, check=True)
    for name in PACKAGES:
        found = sorted(packages.glob(f"{name}_*.deb"))
        if not found:
            raise SystemExit(f"{packages}: no {name}_*.deb; fetch it there with: apt-get download {name}")
        subprocess.run(["dpkg-deb", "-x", str(found[-1]), str(root)], check=True)
    return root


# Task sample ---------------------------------------------------------------------------------------------------------


def wordnet_senses(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (first word of the synset, its gloss without the usage examples)."""
    for part in ("noun", "verb", "adj", "adv"):
        for line in (root / "usr/share/wordnet" / f"data.{part}").read_text("ascii").splitlines():
            if line.startswith("  "):  # the licence
                continue
            fields, _, gloss = line.partition(" | ")
            word = re.sub(r"\((a|p|ip)\)$", "", fields.split(" ")[4]).replace("_", " ")
            definition = re.split(r'[;:,]?\s*"', gloss.strip(), maxsplit=1)[0].strip(" ;:,")
            if 0 < len(definition) <= LONGEST and not UNWELCOME.search(gloss):
                yield word, definition


def write_task(root: Path, rows: int) -> None:
    """Draw `rows` definitions, no two alike, and put WordNet's licence beside them."""
    senses = sorted(set(wordnet_senses(root)))
    order = np.random.default_rng(SEED).permutation(len(senses))
    seen: set[str] = set()
    drawn: list[tuple[str, str]] = []
    for word, definition in (senses[i] for i in order):
        key = " ".join(re.findall(r"\w+", definition.lower()))  # alike but for case and punctuation is alike
        if key not in seen:
            seen.add(key)
            drawn.append((word, definition))
    DEMO.mkdir(parents=True, exist_ok=True)
    with (DEMO / "wordnet_definitions.jsonl").open("w", encoding="utf-8") as out:
        for word, definition in drawn[:rows]:
            out.write(json.dumps({"word": word, "definition": definition}, ensure_ascii=False) + "\n")
    notice = (root / "usr/share/doc/wordnet-base/copyright").read_text("utf-8").split("Files: debian/*")[0]
    (DEMO / "WORDNET-LICENSE.txt").write_text(
        f"wordnet_definitions.jsonl holds {rows} of WordNet 3.0's definitions (the first word of a synset and its\n"
        "gloss without the usage examples), taken from Debian's wordnet-base by benchmarks/demo/make_data.py.\n\n"
        + notice.strip()
        + "\n",
        encoding="utf-8",
    )
    print(f"task: {len(senses)} senses, {len(drawn)} with a definition of their own, {rows} drawn")


# Public-domain texts -------------------------------------------------------------------------------------------------


def r_strings(stream: bytes) -> list[str]:
    """Return the strings of one serialised R character vector (XDR format)."""
    start = stream.index(b"\x00\x00\x00\x10")  # STRSXP without attributes; the header before it holds no such word
    (count,) = struct.unpack_from(">i", stream, start + 4)
    at, strings = start + 8, []
    for _ in range(count):
        _, length = struct.unpack_from(">ii", stream, at)
        strings.append(stream[at + 8 : at + 8 + length].decode("utf-8"))
        at += 8 + length
    return strings


def novels(root: Path) -> Iterator[str]:
    """Yield the chapters of Jane Austen's six novels."""
    stored = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    for _ in NOVELS:  # objects lie one after the other: 4 bytes of length, then a zlib stream
        inflate = zlib.decompressobj()
        text = "\n".join(r_strings(inflate.decompress(stored[4:]))).translate(ASCII)
        stored = inflate.unused_data
        for chapter in re.split(r"(?im)^\s*(?:chapter|volume) [\divxlc]+\.?\s*$", text)[1:]:
            paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", chapter)]
            if len(chapter) > 1_000:
                yield "\n".join(part for part in paragraphs if part)


def bible(root: Path) -> Iterator[str]:
    """Yield the chapters of the King James Bible, a verse a line, without numbers."""
    command = [root / "usr/bin/bible", "-p", root / "usr/lib", "-f", "gen1:1-rev22:21"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout.translate(ASCII)
    chapters: dict[str, list[str]] = {}
    for line in text.splitlines():
        reference, _, verse = line.partition(" ")
        chapters.setdefault(reference.partition(":")[0], []).append(verse)
    yield from ("\n".join(verses) for verses in chapters.values())


def dictd_entries(root: Path, name: str) -> Iterator[str]:
    """Yield the entries of a dictd database, each once."""
    digits = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}
    folder = root / "usr/share/dictd"
    stored = gzip.decompress((folder / f"{name}.dict.dz").read_bytes())
    spans = set()
    for line in (folder / f"{name}.index").read_text("utf-8").splitlines():
        word, *numbers = line.split("\t")
        if not word.startswith(("00-database", "00database")):
            offset, length = (sum(digits[c] * 64**i for i, c in enumerate(reversed(n))) for n in numbers)
            spans.add((offset, length))
    for offset, length in sorted(spans):
        yield stored[offset : offset + length].decode("utf-8").translate(ASCII).strip()


def lexicon(root: Path) -> Iterator[str]:
    """Yield the entries of the Jargon File and of the Devil's Dictionary: headword, word class, text."""
    for entry in dictd_entries(root, "jargon"):
        head, _, body = entry.partition("\n")
        kind, _, body = body.partition("\n")
        kind = re.sub(r"/[^/]*/,?", "", kind).strip(" ,")  # without the pronunciation
        paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", body)]
        text = re.sub(r"[{}]", "", "\n".join(part for part in paragraphs if part))
        if sum(c.isalpha() or c == " " for c in text) > 0.85 * len(text) > 0:  # drawings and tables are left out
            yield f"{head}, {kind} {text}" if kind else f"{head}. {text}"
    for entry in dictd_entries(root, "devil"):
        head = re.match(r"[A-Z][A-Z' -]+", entry)
        if head is None:
            continue
        paragraphs = []
        for part in re.split(r"\n\s*\n", head[0].lower() + entry[head.end() :]):
            verse = part.startswith("  ") and "\n" in part
            lines = [" ".join(line.split()) for line in part.splitlines()]
            paragraphs.append(("\n" if verse else " ").join(lines))
        yield "\n".join(paragraphs).replace("_", "")


def write_texts(root: Path, work: Path) -> None:
    """Write each text as JSON lines {"text", "split"}; whole documents are held out."""
    (work / "texts").mkdir(parents=True, exist_ok=True)
    for number, source in enumerate((novels, bible, lexicon)):
        documents = list(source(root))
        held_out = np.random.default_rng([SEED, number]).random(len(documents)) < HELD_OUT
        path = work / "texts" / f"{source.__name__}.jsonl"
        with path.open("w", encoding="utf-8") as out:
            for text, held in zip(documents, held_out, strict=True):
                out.write(json.dumps({"text": text, "split": "held-out" if held else "train"}) + "\n")
        print(f"{source.__name__}: {len(documents)} documents, {sum(map(len, documents)):,} characters")


def read_texts(work: Path, name: str, split: str) -> list[str]:
    """Return the documents of one text and split."""
    lines = (work / "texts" / f"{name}.jsonl").read_text("utf-8").splitlines()
    return [row["text"] for row in map(json.loads, lines) if row["split"] == split]


def write_tokenizer(work: Path, vocabulary: int) -> None:
    """Train the byte-level BPE on equal shares of the three texts and save it as a GPT-2 tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import GPT2TokenizerFast

    texts = {name: read_texts(work, name, "train") for name in ("novels", "bible", "lexicon")}
    sizes = {name: sum(map(len, documents)) for name, documents in texts.items()}
    # Merges count occurrences: the lexicons, a third the size of the others, are repeated to weigh as much.
    corpus = [text for name, some in texts.items() for text in some * round(max(sizes.values()) / sizes[name])]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END_OF_TEXT)
    fast = GPT2TokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **special)
    fast.save_pretrained(work / "tokenizer")
    print(f"tokenizer: {len(fast)} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, help="directory with the .deb files; default: apt-get download")
    parser.add_argument("--work", type=Path, default=WORK, help="where texts and tokenizer go (default: %(default)s)")
    options = parser.parse_args()
    root = unpack(options.packages, options.work)
    write_task(root, ROWS)
    write_texts(root, options.work)
    write_tokenizer(options.work, VOCABULARY)


if __name__ == "__main__":
    main()
