"""Mistakes in the candidates: each is found from configurations and headers of files, before any data are encoded."""

import json
import shutil
from pathlib import Path

import gguf
import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import load_file, save_file

from lensjax import models

FAMILIES = "bart, gemma3_text, gpt2, llama, mistral, mt5, opt, phi, qwen2, qwen3, switch_transformers, t5."
WEIGHTS, CONFIG = Path("two/model.safetensors"), Path("two/config.json")
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 12\n"
POINTER = "it is a Git LFS pointer, not the file itself: fetch it with git lfs pull."
SAVED = "Use the config.json that these weights were saved with, or download both again."
CONVERT = "transformers.AutoModelForCausalLM.from_pretrained(SOURCE).save_pretrained(TARGET)."


def configure(**values):
    """Change the configuration of the model `two`."""
    CONFIG.write_text(json.dumps(json.loads(CONFIG.read_text()) | values))


def change(edit):
    """Change the tensors of the model `two`."""
    tensors = load_file(WEIGHTS)
    edit(tensors)
    save_file(tensors, WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "./nowhere: no such directory; name a model directory or a Hugging Face id."),
        ("runs/x/two", "runs/x/two: no such directory; name a model directory or a Hugging Face id."),
        (
            "https://huggingface.co/gpt2",
            "https://huggingface.co/gpt2: no such directory; name a model directory or a Hugging Face id.",
        ),
        (
            "two/model.safetensors",
            "two/model.safetensors: is a file; name the directory that holds config.json and model.safetensors.",
        ),
        ("two,three", "--models two,three: no such model; put spaces between models, not commas."),
        ("one", "--models: one and one are the same model; name each candidate once."),
        ("one/", "--models: one and one/ are the same model; name each candidate once."),
        (
            "two+LoRA",
            "--models two+LoRA: a model's name does not end in +LoRA; low-rank adapters are asked for by two+lora.",
        ),
        (
            "two+qlora",
            "--models two+qlora: a model's name does not end in +qlora; low-rank adapters are asked for by two+lora.",
        ),
        (
            "two+lora+lora",
            "--models two+lora+lora: a model's name does not end in +lora; low-rank adapters are asked for by "
            "two+lora.",
        ),
        ("mine.gguf", "mine.gguf: no such file; name a GGUF file that is there."),
    ],
)
def test_names(mistake, name, message):
    assert mistake(models=("one", name)) == message


def test_one_model(mistake):
    assert mistake(models=("one",)) == "--models: 1 model (one); choosing needs at least two candidates."


def test_a_copy(mistake):
    shutil.copytree("one", "copy")
    assert mistake(models=("one", "copy")) == ("--models: one and copy are the same model; name each candidate once.")


def test_an_id_that_the_hub_does_not_give(mistake, monkeypatch):
    def snapshot_download(*_, **__):
        raise LocalEntryNotFoundError("no snapshot here, and no way out.\nmore that nobody reads")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert mistake(models=("one", "openai-comunity/gpt2")) == (
        "openai-comunity/gpt2: is no directory here and could not be had from the Hugging Face hub (no snapshot here, "
        "and no way out.). Check the id and the network, or download the model and name its directory."
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "mamba"}, f"model_type 'mamba' is not supported; supported: {FAMILIES}"),
        (
            {"model_type": "llava", "vision_config": {}},
            f"model_type 'llava' is not supported; supported: {FAMILIES}",
        ),
        ({"model_type": None}, 'config.json has no model_type; add it, for instance "model_type": "gpt2".'),
        (
            {"model_type": "phi3", "auto_map": {"AutoModelForCausalLM": "modeling.py"}},
            "model_type 'phi3' is not supported, and the code that comes with the model (auto_map in config.json) is "
            f"not run; supported: {FAMILIES}",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "its weights are quantised (gptq), which cannot be fine-tuned as they are; name the model they were made "
            "from, or a GGUF file. If they are floating-point numbers again, remove quantization_config from "
            "config.json.",
        ),
        ({"n_head": 3}, "n_embd 16 is not a multiple of n_head 3; correct config.json."),
        ({"n_embd": "16"}, "n_embd is '16'; it must be a positive whole number: correct config.json."),
        (
            {"activation_function": "swish2"},
            "activation 'swish2' is not supported; supported: gelu, gelu_fast, gelu_new, gelu_pytorch_tanh, "
            "quick_gelu, relu, silu, swish, tanh.",
        ),
    ],
)
def test_configurations(mistake, values, message):
    configure(**values)
    assert mistake() == f"two: {message}"


def test_broken_configurations(mistake):
    CONFIG.write_text("{")
    assert mistake() == (
        "two/config.json: is not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 "
        "(char 1)); download it again."
    )
    CONFIG.write_text("[]")
    assert mistake() == "two/config.json: must hold a JSON object, found list; download it again."


def test_directories_that_are_no_models(mistake):
    CONFIG.unlink()
    assert mistake() == "two: has no config.json; name a directory in Hugging Face format."
    for step in (60, 500):
        shutil.copytree("one", f"output/checkpoint-{step}")
    assert mistake(models=("one", "output")) == (
        "output: has no config.json; name output/checkpoint-500, which has one."
    )
    shutil.copytree("one", "models--a--b/snapshots/1234")
    assert mistake(models=("one", "models--a--b")) == (
        "models--a--b: has no config.json; name models--a--b/snapshots/1234, which has one."
    )
    Path("two/adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "gpt2"}')
    assert mistake() == (
        "two: has no config.json; it holds adapters (adapter_config.json), not a model: name their base model gpt2, or "
        "merge them into it with peft's merge_and_unload() and name what that saves."
    )


def test_weights_that_are_not_there(mistake):
    WEIGHTS.rename("two/model.pt")
    assert mistake() == (
        "two: has only model.pt, which lensjax does not open: such files can run code. Convert it once, where "
        f"you trust it and have torch: {CONVERT}"
    )
    Path("two/model.pt").unlink()
    assert mistake() == (
        "two: has no model.safetensors and no model.safetensors.index.json. If it comes with pickled weights only "
        f"(pytorch_model.bin), convert it once where you trust it: {CONVERT}"
    )


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (
            lambda raw: raw[:-1000],
            " (Error while deserializing header: incomplete metadata, file not fully covered); download it again.",
        ),
        (lambda raw: raw[:100], " (Error while deserializing header: invalid header length); download it again."),
        (lambda _: b"", " (Error while deserializing header: header too small); download it again."),
        (lambda _: LFS, f": {POINTER}"),
    ],
)
def test_damaged_weights(mistake, cut, message):
    WEIGHTS.write_bytes(cut(WEIGHTS.read_bytes()))
    assert mistake() == f"two/model.safetensors: cannot be read as safetensors{message}"


def test_shards(mistake):
    models.save_pretrained(models.load_model("two"), "two", max_shard_size=20000)
    Path("two/model-00002-of-00002.safetensors").unlink()
    assert mistake() == (
        "two: shards named in model.safetensors.index.json are missing: model-00002-of-00002.safetensors; download "
        "them again."
    )
    Path("two/model.safetensors.index.json").write_text("[]")
    assert mistake().startswith("two/model.safetensors.index.json: is not a valid index of shards (TypeError(")


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda tensors: tensors.pop("transformer.ln_f.bias"), "missing: transformer.ln_f.bias"),
        (lambda tensors: tensors.update(extra=np.zeros(3, np.float32)), "unused: extra"),
        (
            lambda tensors: tensors.update({"transformer.ln_f.bias": np.zeros(9, np.float32)}),
            "wrong shape: transformer.ln_f.bias has (9,), which does not make (16,) for norm.bias",
        ),
    ],
)
def test_weights_that_do_not_fit(mistake, edit, problem):
    change(edit)
    assert mistake(lines=3) == (f"two: the checkpoint does not fit its config.json, 1 problem:\n  {problem}\n  {SAVED}")


def test_the_configuration_of_a_larger_model(mistake):
    configure(n_layer=3)
    first, *problems, more, remedy = mistake(lines=23).split("\n")
    assert first == "two: the checkpoint does not fit its config.json, 24 problems:"
    assert len(problems) == 20
    assert all(
        problem.startswith(("  missing: transformer.h.1.", "  missing: transformer.h.2.")) for problem in problems
    )
    assert (more, remedy) == ("  and 4 more", f"  {SAVED}")


def test_quantised_weights(mistake):
    change(lambda tensors: tensors.update({"transformer.ln_f.bias": np.zeros(16, np.int8)}))
    assert mistake() == (
        "two: transformer.ln_f.bias is stored as I8, so its weights are quantised; name the model they were made from, "
        "or a GGUF file."
    )


def test_tokenizers(mistake):
    file = Path("two/tokenizer.json")
    remedy = "put tokenizer.json and tokenizer_config.json beside config.json."
    file.write_text("{")
    assert mistake() == (
        "two: its tokenizer cannot be loaded (Expecting property name enclosed in double quotes: line 1 column 2 "
        f"(char 1)); {remedy}"
    )
    file.unlink()
    assert mistake() == (
        "two: its tokenizer cannot be loaded (none of tokenizer.json, tokenizer.model, spiece.model, "
        f"sentencepiece.bpe.model, vocab.json, vocab.txt is there); {remedy}"
    )


def test_the_tokenizer_of_another_model(mistake):
    configuration = json.loads(Path("one/config.json").read_text()) | {"vocab_size": 50}
    models.save_pretrained(models.init_model(configuration, jax.random.key(0)), "small")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"one/{file}", "small")
    assert mistake(models=("one", "small")) == (
        "--models small: its tokenizer gives token 1606, but the model knows 50 tokens. Use the tokenizer the model "
        "was trained with."
    )


def write_gguf(architecture="gpt2", kind=None, split=False, tokenizer=None):
    """Write mine.gguf, a GPT-2 of one layer whose embedding is stored in a kind of quantisation."""
    writer = gguf.GGUFWriter("mine.gguf", architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(64)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-5)
    if split:
        writer.add_uint16("split.count", 3)
    if tokenizer is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(tokenizer)
        writer.add_token_list(["a", "b"])
    if kind is None:
        writer.add_tensor("token_embd.weight", np.zeros((2, 256), np.float32))
    else:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor("token_embd.weight", np.zeros((2, 256 // block * size), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"architecture": "t5"},
            "GGUF architecture 't5' is not supported; supported: gemma3, gpt2, llama, phi2, qwen2, qwen3.",
        ),
        (
            {"split": True},
            "is one of 3 parts of a model; join them with llama.cpp's llama-gguf-split --merge.",
        ),
        (
            {"kind": gguf.GGMLQuantizationType.Q8_K},
            "the tensor token_embd.weight is stored as Q8_K, which the gguf package does not dequantise; use a file of "
            "another quantisation.",
        ),
    ],
)
def test_gguf_files_of_another_kind(mistake, options, message):
    write_gguf(**options)
    assert mistake(models=("one", "mine.gguf")) == f"mine.gguf: {message}"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"lmgg", " (it does not begin with GGUF); download it again."),
        (b"GGUF\x03\x00", " (it ends too early); download it again."),
        (LFS, f": {POINTER}"),
    ],
)
def test_damaged_gguf_files(mistake, raw, message):
    Path("mine.gguf").write_bytes(raw)
    assert mistake(models=("one", "mine.gguf")) == f"mine.gguf: cannot be read as GGUF{message}"


def test_misspelt_gguf_files(mistake):
    write_gguf()
    assert mistake(models=("one", "min.gguf")) == (
        "min.gguf: no such file; name a GGUF file that is there. Did you mean mine.gguf?"
    )


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("two+lora", ("--lora-alpha", 0), "LoRA's alpha is 0.0; it must be a positive number, such as 16."),
        ("two+lora", ("--lora-dropout", 1.5), "LoRA's dropout is 1.5; it must be at least 0 and less than 1."),
        (
            "two",
            ("--lora-rank", 4),
            "--lora-rank: no candidate has adapters; name one MODEL+lora, or remove --lora-rank.",
        ),
    ],
)
def test_adapters(mistake, model, options, message):
    assert mistake(*options, models=("one", model)) == message


def test_texts_for_an_encoder_decoder(mistake):
    configuration = {"model_type": "t5", "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    configuration |= {"vocab_size": json.loads(CONFIG.read_text())["vocab_size"], "decoder_start_token_id": 0}
    models.save_pretrained(models.init_model(configuration, jax.random.key(0)), "reader")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"one/{file}", "reader")
    assert mistake("--text-field", "input", models=("one", "reader")) == (
        "an encoder-decoder model has no input to read in language modelling; give --input-field and --target-field, "
        "or leave this candidate out (reader)."
    )
