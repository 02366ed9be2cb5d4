"""Write the golden values of the encoder-decoder families with torch and transformers.

    python tests/support/golden_seq2seq.py [DIRECTORY] [SEED]      # needs the parity extra

For each case DIRECTORY/<case> holds config.json, model.safetensors (as transformers saves them) and
golden.safetensors: inputs, logits, the sum of each sample's losses, and the gradient of the sum of them all
("grad." + name of the parameter); for sparse models also the router loss of the batch and its gradient
("router." + name). Everything is computed in float64 and stored in float32.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

T5 = {"vocab_size": 113, "d_model": 32, "d_kv": 8, "num_heads": 3, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 2}
# Few buckets, so that sequences of 12 tokens reach the logarithmic ones and the last.
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 9, "decoder_start_token_id": 0}
BART = {"vocab_size": 113, "d_model": 32, "max_position_embeddings": 14, "encoder_layers": 2, "decoder_layers": 2}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 24}

CASES = {
    # As t5-small and t5-base ship.
    "t5-v1.0": ("T5", T5),
    # As t5-v1_1-*: the file says that the head is not tied, and its inputs are not scaled.
    "t5-v1.1": (
        "T5",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 1, "d_kv": 10},
    ),
    # As the published mT5: a head of its own.
    "mt5-untied": ("MT5", T5 | {"vocab_size": 97, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3}),
    # As transformers makes a new mT5: tied, and yet not scaled.
    "mt5-tied": ("MT5", T5 | {"feed_forward_proj": "gated-silu", "num_layers": 1, "decoder_start_token_id": 3}),
    # As bart-base and bart-large ship.
    "bart": ("Bart", BART),
    # Each switch away from its default; the decoder of 1 layer as in distilbart.
    "bart-scaled": (
        "Bart",
        BART
        | {"scale_embedding": True, "decoder_layers": 1, "activation_function": "relu", "pad_token_id": 5}
        | {"decoder_start_token_id": 7, "eos_token_id": 7},
    ),
    # As switch-base-*: every second layer is sparse. Experts of 3 tokens drop some.
    "switch_transformers": (
        "SwitchTransformers",
        T5
        | {"num_experts": 4, "expert_capacity": 3, "num_layers": 4, "num_sparse_encoder_layers": 2}
        | {"num_sparse_decoder_layers": 1, "router_z_loss_coef": 0.05, "router_aux_loss_coef": 0.3},
    ),
    # Each switch away from its default, among them a head of its own, whose inputs are not scaled.
    "switch_transformers-untied": (
        "SwitchTransformers",
        T5
        | {"num_experts": 3, "expert_capacity": 2, "num_layers": 1, "num_decoder_layers": 1, "router_bias": True}
        | {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "tie_word_embeddings": False}
        | {"dense_act_fn": "gelu_new"},
    ),
}


def load(directory):
    """Return transformers' model of a directory, in float64 where the model itself has float32."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)
    return double(model.eval())


def double(model):
    """Compute in float64, also where the model itself insists on float32; the mathematics are the same."""
    import torch

    model = model.double()
    for module in model.modules():
        if type(module).__name__.endswith("Top1Router"):
            module.dtype = torch.float64
        if type(module).__name__ in ("T5LayerNorm", "MT5LayerNorm", "SwitchTransformersLayerNorm"):
            module.forward = partial(rms_norm, module)
    return model


def rms_norm(module, x):
    return module.weight * x * (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()


def gradient(parameter):
    """Return the gradient; that of an expert no token has chosen is not even made."""
    import torch

    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


def make(directory: Path, seed: int, cases: tuple[str, ...]) -> None:
    import torch
    import transformers
    from safetensors.torch import save_file

    for case in cases:
        family, values = CASES[case]
        torch.manual_seed(seed)
        config = getattr(transformers, family + "Config")(**values)
        config._attn_implementation = "eager"
        model = getattr(transformers, family + "ForConditionalGeneration")(config).eval()
        untied = values.get("tie_word_embeddings") is False
        embedding = model.get_input_embeddings().weight
        if untied:
            model.lm_head.weight = torch.nn.Parameter(torch.empty_like(embedding))
            # transformers 5 unties these too where it does not force the tie; the published models have one table.
            model.encoder.embed_tokens.weight = model.decoder.embed_tokens.weight = embedding
        with torch.no_grad():
            for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
                # Far larger than at initialisation, and not 0 or 1 anywhere: a wrong mapping or constant must show.
                parameter.copy_(
                    0.15 * torch.randn_like(parameter) + (1.0 if "norm" in name and "weight" in name else 0)
                )
        model.save_pretrained(directory / case)
        (directory / case / "generation_config.json").unlink(missing_ok=True)
        if untied:
            # transformers 5 forgets that the head is not tied; published files say it.
            file = directory / case / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": False}, indent=2))
        model = double(model)

        pad = model.config.pad_token_id
        ids = torch.randint(0, config.vocab_size, (3, 12))
        mask = torch.ones_like(ids)
        mask[1, 8:] = 0
        ids[1, 8:] = pad
        ids[0, 2] = pad  # a padding token that the mask keeps
        labels = torch.randint(0, config.vocab_size, (3, 10))
        labels[1, 6:] = -100
        labels[2, :3] = -100
        out = model(input_ids=ids, attention_mask=mask, labels=labels)
        losses = torch.nn.functional.cross_entropy(
            out.logits.transpose(1, 2), labels, ignore_index=-100, reduction="none"
        ).sum(1)
        # transformers' own loss is the mean over all tokens of the batch that have a label.
        assert torch.allclose(out.loss.double(), losses.sum() / (labels != -100).sum(), rtol=1e-5)
        losses.sum().backward()
        golden = {"input_ids": ids.int(), "attention_mask": mask.int(), "labels": labels.int()}
        golden |= {"logits": out.logits, "loss_sums": losses}
        golden |= {"grad." + name: gradient(p) for name, p in model.named_parameters()}
        if family == "SwitchTransformers":
            model.zero_grad()
            routed = model(input_ids=ids, attention_mask=mask, labels=labels, output_router_logits=True)
            router_loss = routed.loss - out.loss.detach()
            ce = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            (routed.loss - ce).backward()
            golden["router_loss"] = router_loss
            golden |= {"router." + n: gradient(p) for n, p in model.named_parameters() if "router" in n}
        golden = {k: v.detach().float().contiguous() if v.is_floating_point() else v for k, v in golden.items()}
        save_file(golden, directory / case / "golden.safetensors")


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "models" / "golden"
    make(target, int(sys.argv[2]) if len(sys.argv) > 2 else 0, tuple(CASES))
