"""Pre-train the demo's models on a CPU, about 30 minutes on two busy cores; a model that has its card is skipped.

    python benchmarks/demo/make_data.py && python benchmarks/demo/pretrain.py [NAME ...]

Each becomes a Hugging Face directory below lensjax/data/demo/models: float16 weights, tokenizer, configuration, card.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from make_data import DEMO, END_OF_TEXT, SEED, WORK, read_texts

from lensjax.models import count_parameters, init_model, load_model, load_tokenizer, save_pretrained

LENGTH = 128
BATCH = 16
TEXTS = ("novels", "bible", "lexicon")
SOURCES = {
    "novels": (
        "Jane Austen's six novels, 1811 to 1817",
        "r-cran-janeaustenr",
        "in the public domain, for the author died in 1817; the R package that carries them is under the MIT licence",
    ),
    "bible": (
        "the King James Bible, 1611",
        "bible-kjv-text",
        "in the public domain outside the United Kingdom; the package's copyright file calls its copyright expired",
    ),
    "lexicon": (
        "the Jargon File 4.4.7 (2003) and Ambrose Bierce's Devil's Dictionary (1911), entry by entry",
        "dict-jargon and dict-devil",
        "both in the public domain: the first dedicated to it, the second's copyright expired",
    ),
}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One model of the demo: its texts, its shape, its schedule."""

    name: str
    texts: tuple[str, ...]
    width: int
    layers: int
    heads: int
    learning_rate: float
    steps: int

    @property
    def config(self) -> dict[str, Any]:
        """Contents of config.json."""
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": None,
            "n_positions": LENGTH,
            "n_embd": self.width,
            "n_layer": self.layers,
            "n_head": self.heads,
            "activation_function": "gelu_new",
            # One epoch or a few over little text: dropout would only slow such small models down.
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
        }


CANDIDATES = (
    Candidate("bible-tiny", ("bible",), 48, 2, 4, 4e-3, 2_000),
    Candidate("lexicon-small", ("lexicon",), 64, 2, 4, 4e-3, 2_000),
    Candidate("novels-medium", ("novels",), 96, 3, 4, 3e-3, 2_000),
    Candidate("mixed-medium", TEXTS, 96, 3, 4, 3e-3, 2_000),
    Candidate("novels-large", ("novels",), 128, 4, 4, 2e-3, 1_500),
    Candidate("bible-xl", ("bible",), 160, 4, 5, 2e-3, 1_500),
)


def token_stream(tokenizer: Any, work: Path, text: str, split: str) -> np.ndarray:
    """Return the tokens of one text and split, each document after an end-of-text token."""
    encoded = tokenizer([END_OF_TEXT + document for document in read_texts(work, text, split)], verbose=False)
    return np.concatenate([np.asarray(ids, np.int32) for ids in encoded["input_ids"]])


def draw(streams: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Return one batch of windows, each from a text drawn evenly."""
    which = rng.integers(len(streams), size=BATCH)
    starts = [rng.integers(len(streams[i]) - LENGTH) for i in which]
    return np.stack([streams[i][start : start + LENGTH] for i, start in zip(which, starts, strict=True)])


def mean_loss(model: nnx.Module, stream: np.ndarray, windows: int = 384) -> float:
    """Return the loss in nats per token over the first non-overlapping windows of a stream."""
    graph, state = nnx.split(model)

    @jax.jit
    def sums(state: Any, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        return nnx.merge(graph, state).loss_sums({"input_ids": ids, "labels": ids})

    rows = stream[: len(stream) // LENGTH * LENGTH].reshape(-1, LENGTH)[:windows]
    # Whole batches only: one compilation, and no padding that would have to be masked.
    totals = [sums(state, rows[i : i + BATCH]) for i in range(0, len(rows) // BATCH * BATCH, BATCH)]
    return float(sum(loss.sum() for loss, _ in totals) / sum(count.sum() for _, count in totals))


def make_step(graph: Any, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """Return the jit-compiled step (parameters, optimiser state, ids) -> (parameters, optimiser state, loss)."""

    def mean(params: Any, ids: jax.Array) -> jax.Array:
        losses, counts = nnx.merge(graph, params).loss_sums({"input_ids": ids, "labels": ids})
        return losses.sum() / counts.sum()

    def step(params: Any, state: Any, ids: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(mean)(params, ids)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def pretrain(candidate: Candidate, work: Path, target: Path) -> None:
    """Train one model, save it, and write its card last."""
    tokenizer = load_tokenizer(work / "tokenizer")
    config = {**candidate.config, "vocab_size": len(tokenizer)}
    train = [token_stream(tokenizer, work, text, "train") for text in candidate.texts]
    held_out = {text: token_stream(tokenizer, work, text, "held-out") for text in TEXTS}

    model = init_model(config, jax.random.key(SEED))
    graph, params = nnx.split(model, nnx.Param)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, candidate.learning_rate, candidate.steps // 20, candidate.steps, candidate.learning_rate / 50
    )
    decayed = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.1, mask=decayed)
    )
    step, state = make_step(graph, optimizer), optimizer.init(params)
    # The same draws for every model on the same text, whatever was trained before it.
    rng = np.random.default_rng([SEED, *(TEXTS.index(text) for text in candidate.texts)])
    losses, began = [], time.perf_counter()
    for i in range(candidate.steps):
        params, state, loss = step(params, state, draw(train, rng))
        losses.append(loss)
        if (i + 1) % 100 == 0:
            mean = float(jnp.mean(jnp.stack(losses[-100:])))
            print(f"{candidate.name}: step {i + 1}, loss {mean:.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    model = nnx.merge(graph, params)
    before = {text: mean_loss(model, stream) for text, stream in held_out.items()}
    save_pretrained(model, target, dtype=jnp.float16)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # as they are: saving again would add where they lay
        shutil.copyfile(work / "tokenizer" / name, target / name)
    after = {text: mean_loss(load_model(target), stream) for text, stream in held_out.items()}
    final = float(jnp.mean(jnp.stack(losses[-100:])))
    (target / "README.md").write_text(card(candidate, target, train, final, before, after), "utf-8")
    worst = max(abs(after[text] - before[text]) for text in TEXTS)
    print(f"{candidate.name}: {final:.3f}, held out {before}, float16 moves it by at most {worst:.1e}", flush=True)


def card(
    candidate: Candidate,
    target: Path,
    train: list[np.ndarray],
    final: float,
    before: dict[str, float],
    after: dict[str, float],
) -> str:
    """Return the model card."""
    seen = candidate.steps * BATCH * LENGTH
    texts = [
        f"- {text}: {SOURCES[text][0]}; {len(stream):,} tokens; from Debian's {SOURCES[text][1]}; {SOURCES[text][2]}."
        for text, stream in zip(candidate.texts, train, strict=True)
    ]
    known = {text: " (pre-trained on it)" if text in candidate.texts else "" for text in TEXTS}
    rows = [f"| {text}{known[text]} | {before[text]:.4f} | {after[text]:.4f} |" for text in TEXTS]
    vocabulary = json.loads((target / "config.json").read_text("utf-8"))["vocab_size"]
    return "\n".join(
        [
            "---",
            "language: en",
            "library_name: transformers",
            "tags: [gpt2, demonstration]",
            "---",
            "",
            f"# {candidate.name}",
            "",
            "A demonstration model of lensjax, made to be fine-tuned within seconds by `python -m lensjax.select`. "
            "It is too small and has read too little to be of use for anything else; its texts are as old as their "
            "opinions.",
            "",
            f"- Architecture: GPT-2, {candidate.layers} layers, width {candidate.width}, {candidate.heads} heads, "
            f"{LENGTH} positions, tied embedding; {count_parameters(target):,} parameters, stored in float16.",
            f"- Tokenizer: byte-level BPE of {vocabulary:,} tokens, the same for all models of the demo, trained on "
            "the texts of all of them.",
            f"- Training: {candidate.steps:,} steps of {BATCH} windows of {LENGTH} tokens, {seen:,} tokens in all, "
            f"{seen / sum(map(len, train)):.1f} times the text"
            + (", a third from each text" if len(train) > 1 else "")
            + f"; AdamW, learning rate {candidate.learning_rate:g} with warm-up and cosine decay, seed {SEED}, "
            "float32 on a CPU.",
            f"- Loss of the last 100 training steps: {final:.4f} nats per token.",
            "",
            "Text:",
            "",
            *texts,
            "",
            "Loss on held-out documents, nats per token:",
            "",
            "| text | float32, before saving | float16, as shipped |",
            "|---|---|---|",
            *rows,
            "",
            "Regenerate: `python benchmarks/demo/make_data.py && python benchmarks/demo/pretrain.py "
            f"--again {candidate.name}` (Debian). The weights come from public-domain text only and are under "
            "this repository's terms.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="models to make (default: all)")
    parser.add_argument("--again", action="store_true", help="make them even if they are there")
    parser.add_argument("--work", type=Path, default=WORK, help="where make_data.py wrote (default: %(default)s)")
    parser.add_argument("--models", type=Path, default=DEMO / "models", help="target (default: %(default)s)")
    options = parser.parse_args()
    unknown = set(options.names) - {candidate.name for candidate in CANDIDATES}
    if unknown:
        parser.error(f"no such model: {', '.join(sorted(unknown))}")
    for candidate in CANDIDATES:
        target = options.models / candidate.name
        if options.names and candidate.name not in options.names:
            continue
        if (target / "README.md").exists() and not options.again:
            print(f"{candidate.name}: is there", flush=True)
            continue
        pretrain(candidate, options.work, target)


if __name__ == "__main__":
    main()
