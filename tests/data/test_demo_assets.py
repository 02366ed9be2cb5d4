"""The demo's task and models as they are shipped: complete, small, clean, loadable."""

import importlib.resources
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from lensjax.models import count_parameters, from_pretrained, load_config, load_tokenizer

DEMO = Path(str(importlib.resources.files("lensjax"))) / "data" / "demo"
MODELS = {
    "bible-tiny": 161_088,
    "lexicon-small": 239_360,
    "novels-medium": 544_608,
    "mixed-medium": 544_608,
    "novels-large": 1_071_872,
    "bible-xl": 1_585_600,
}
FILES = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
VOCABULARY = 2048


@pytest.fixture(scope="module")
def rows():
    return [json.loads(line) for line in (DEMO / "wordnet_definitions.jsonl").read_text("utf-8").splitlines()]


def size_of(directory):
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def test_shipped_files_are_complete_and_nothing_else_lies_there():
    assert {path.name for path in DEMO.iterdir()} == {"models", "wordnet_definitions.jsonl", "WORDNET-LICENSE.txt"}
    assert {path.name: {file.name for file in path.iterdir()} for path in (DEMO / "models").iterdir()} == dict.fromkeys(
        MODELS, FILES
    )


def test_shipped_files_are_small():
    assert size_of(DEMO / "models") < 10e6
    assert sum(file.stat().st_size for file in DEMO.glob("*.*")) < 5e6
    assert (DEMO / "wordnet_definitions.jsonl").stat().st_size < 2.5e6


def test_task_rows_are_clean(rows):
    assert len(rows) == 7_200
    for row in rows:
        assert list(row) == ["word", "definition"]
        for text in row.values():
            assert text == " ".join(text.split()) != ""
        assert "_" not in row["word"]
        assert '"' not in row["definition"], "a usage example was left in"
        assert not re.search(r"[;:,]$", row["definition"])


def test_no_definition_comes_twice(rows):
    # Alike but for case and punctuation counts as alike: no split of the rows can then leak.
    plain = [" ".join(re.findall(r"\w+", row["definition"].lower())) for row in rows]
    assert len(set(plain)) == len(plain)
    assert "" not in plain


def test_wordnet_licence_notice_is_there():
    notice = " ".join((DEMO / "WORDNET-LICENSE.txt").read_text("utf-8").split())
    assert "WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved." in notice
    assert "Permission to use, copy, modify and distribute this software and database" in notice
    assert 'THIS SOFTWARE AND DATABASE IS PROVIDED "AS IS"' in notice
    assert "The name of Princeton University or Princeton may not be used in advertising" in notice


def test_every_sample_fits_into_the_models(rows):
    tokenizer = load_tokenizer(DEMO / "models" / "bible-tiny")
    lengths = [len(ids) for ids in tokenizer([f"{row['word']}: {row['definition']}" for row in rows])["input_ids"]]
    # Two more for a beginning and an end of text.
    assert max(lengths) + 2 <= 128


def test_models_share_one_tokenizer_which_gives_text_back():
    files = {
        name: [(DEMO / "models" / name / file).read_bytes() for file in ("tokenizer.json", "tokenizer_config.json")]
        for name in MODELS
    }
    assert all(contents == files["bible-tiny"] for contents in files.values())
    tokenizer = load_tokenizer(DEMO / "models" / "bible-tiny")
    assert tokenizer.is_fast
    assert len(tokenizer) == VOCABULARY
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.convert_ids_to_tokens(0) == "<|endoftext|>"
    for text in ("dado: a rectangular groove cut into a board", " naïve\n\t“日本”  two  spaces", "A1!"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("name", MODELS)
def test_configuration_and_weights(name):
    config = load_config(DEMO / "models" / name)
    assert (config.model_type, config.vocab_size, config.max_length) == ("gpt2", VOCABULARY, 128)
    assert count_parameters(DEMO / "models" / name) == MODELS[name]
    with safe_open(DEMO / "models" / name / "model.safetensors", "np") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the handle is not iterable
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"float16"}
    assert sum(tensor.size for tensor in tensors.values()) == MODELS[name]
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())


@pytest.mark.parametrize("name", MODELS)
def test_card_says_what_the_model_is(name):
    card = (DEMO / "models" / name / "README.md").read_text("utf-8")
    assert f"# {name}\n" in card
    assert "demonstration model" in card
    assert f"{MODELS[name]:,} parameters" in card
    assert "public domain" in card
    assert "benchmarks/demo/pretrain.py" in card
    kept = re.findall(r"^\| (?:novels|bible|lexicon).*\| (\d\.\d+) \| (\d\.\d+) \|$", card, re.MULTILINE)
    assert len(kept) == 3
    for before, after in kept:
        assert float(after) == pytest.approx(float(before), abs=1e-3), "float16 must not cost what one would notice"


@pytest.mark.parametrize("name", MODELS)
def test_model_has_learnt_something(name, rows):
    model, tokenizer = from_pretrained(DEMO / "models" / name)
    batch = {key: np.zeros((16, 128), np.int32) for key in ("input_ids", "attention_mask")}
    batch["labels"] = np.full((16, 128), -100, np.int32)
    for i, row in enumerate(rows[:16]):
        prompt = tokenizer(f"<|endoftext|>{row['word']}:")["input_ids"]
        ids = prompt + tokenizer(f" {row['definition']}")["input_ids"]
        batch["input_ids"][i, : len(ids)], batch["attention_mask"][i, : len(ids)] = ids, 1
        batch["labels"][i, len(prompt) : len(ids)] = ids[len(prompt) :]
    graph, state = nnx.split(model)
    losses, counts = jax.jit(lambda state: nnx.merge(graph, state).loss_sums(batch))(state)
    assert np.isfinite(losses).all()
    assert (np.asarray(counts) == (batch["labels"] >= 0).sum(axis=1)).all()
    assert float(losses.sum() / counts.sum()) < math.log(VOCABULARY)
