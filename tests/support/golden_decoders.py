"""Write the golden values of tests/models with torch and transformers.

    python tests/support/golden_decoders.py [DIRECTORY] [SEED]      # needs the parity extra

For each case DIRECTORY/<case> holds config.json, model.safetensors (as transformers saves them) and
golden.safetensors: inputs, logits, the sum of each sample's losses, and the gradient of the sum of them all
("grad." + name of the parameter). Everything is computed in float64 and stored in float32.
"""

import os
import sys
from pathlib import Path

CASES = {
    # As gpt2 ships.
    "gpt2-tied": {"activation_function": "gelu_new", "n_head": 4},
    # Each switch away from its default.
    "gpt2-untied": {
        "activation_function": "relu",
        "n_head": 2,
        "n_inner": 24,
        "layer_norm_epsilon": 1e-3,
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
        "tie_word_embeddings": False,
    },
    "gpt2-unscaled": {"activation_function": "gelu", "n_head": 4, "n_layer": 1, "scale_attn_weights": False},
}

DECODER = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": None,
}
DECODERS = {
    # Llama 3.x: of the four frequencies one stays, one is in the band, two are divided. And every bias there is.
    "llama": {
        "max_position_embeddings": 256,
        "num_key_value_heads": 2,
        "intermediate_size": 40,
        "attention_bias": True,
        "mlp_bias": True,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    # SmolLM2's tied head, one key head for all, and linear scaling.
    "llama-tied": {
        "num_key_value_heads": 1,
        "intermediate_size": 40,
        "tie_word_embeddings": True,
        "hidden_act": "gelu",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
    },
    "mistral": {"num_key_value_heads": 2, "intermediate_size": 40, "sliding_window": 5, "head_dim": 12},
    # One layer that sees all and one with a window.
    "qwen2": {
        "num_key_value_heads": 2,
        "intermediate_size": 40,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {"num_key_value_heads": 2, "intermediate_size": 40, "head_dim": 12, "attention_bias": True},
    # 1.3b and larger.
    "opt": {"ffn_dim": 40},
    # 350m.
    "opt-post": {"ffn_dim": 40, "word_embed_proj_dim": 24, "do_layer_norm_before": False},
    "opt-bare": {
        "ffn_dim": 40,
        "num_hidden_layers": 1,
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "tie_word_embeddings": False,
        "activation_function": "gelu",
    },
    # Phi-2: 0.4 of each head turns, and 0.4 x 10 is not exact.
    "phi": {
        "hidden_size": 40,
        "intermediate_size": 40,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4},
    },
    "phi-norms": {
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "qk_layernorm": True,
        "layer_norm_eps": 1e-3,
        "tie_word_embeddings": True,
    },
    # Both kinds of layers, each with its own angles.
    "gemma3": {
        "num_key_value_heads": 2,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "head_dim": 12,
        "query_pre_attn_scalar": 20,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
}


def make_decoders(directory: Path, seed: int) -> None:
    """Write the cases of `DECODERS`; the part of a name before the hyphen is the family."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    def exact(norm, offset):
        # transformers computes this norm in float32 whatever it is given.
        epsilon = norm.eps if offset else norm.variance_epsilon
        scaled = lambda x: x * (x.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt() * (offset + norm.weight)  # noqa: E731
        norm.forward = scaled

    for case, values in DECODERS.items():
        torch.manual_seed(seed)
        family = case.split("-")[0]
        config = AutoConfig.for_model("gemma3_text" if family == "gemma3" else family, **DECODER | values)
        # Its own implementation of attention casts to float32 as well, "sdpa" does not.
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # As above; norms vary around what they start at.
                start = parameter.mean().round() if "norm" in name else 0.0
                parameter.copy_(start + 0.2 * torch.randn_like(parameter))
        model.save_pretrained(directory / case)
        model = model.double()
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                exact(module, 1.0 if family == "gemma3" else 0.0)

        ids = torch.randint(0, config.vocab_size, (4, 16))
        mask = torch.ones_like(ids)
        mask[1, 11:] = 0
        mask[2, :4] = 0
        labels = ids.clone()
        labels[mask == 0] = -100
        labels[2, 4] = -100  # what padding predicts
        labels[3, :4] = -100
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
        ).sum(1)
        losses.sum().backward()
        golden = {"input_ids": ids.int(), "attention_mask": mask.int(), "labels": labels.int()}
        golden |= {"logits": logits, "loss_sums": losses}
        golden |= {"grad." + name: parameter.grad for name, parameter in model.named_parameters()}
        assert all(bool(torch.isfinite(value).all()) for value in golden.values())
        assert logits.dtype == torch.float64
        golden = {k: v.detach().float().contiguous() if v.is_floating_point() else v for k, v in golden.items()}
        save_file(golden, directory / case / "golden.safetensors")
        (directory / case / "generation_config.json").unlink(missing_ok=True)


def make(directory: Path, seed: int) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import GPT2Config, GPT2LMHeadModel

    for case, values in CASES.items():
        torch.manual_seed(seed)
        sizes = {"vocab_size": 41, "n_embd": 16, "n_layer": 2, "n_positions": 12, "bos_token_id": 1, "eos_token_id": 1}
        config = GPT2Config(**sizes | values, attn_implementation="eager")
        model = GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Far larger than at initialisation, and not 0 or 1 anywhere: a wrong mapping or constant must show.
                parameter.copy_(0.3 * torch.randn_like(parameter) + (1.0 if "ln_" in name and "weight" in name else 0))
        model.save_pretrained(directory / case)
        model = model.double()
        for block in model.transformer.h:
            block.attn.reorder_and_upcast_attn = False  # refuses float64; without it the mathematics are the same

        ids = torch.randint(0, config.vocab_size, (3, 10))
        mask = torch.ones_like(ids)
        mask[1, 7:] = 0
        labels = ids.clone()
        labels[mask == 0] = -100
        labels[2, :4] = -100
        logits = model(input_ids=ids, attention_mask=mask).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
        ).sum(1)
        # transformers' own loss is the mean over all tokens of the batch that have a label.
        own = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        assert torch.allclose(own.double(), losses.sum() / (labels[:, 1:] != -100).sum(), rtol=1e-5)
        losses.sum().backward()
        golden = {"input_ids": ids.int(), "attention_mask": mask.int(), "labels": labels.int()}
        golden |= {"logits": logits, "loss_sums": losses}
        golden |= {"grad." + name: parameter.grad for name, parameter in model.named_parameters()}
        golden = {k: v.detach().float().contiguous() if v.is_floating_point() else v for k, v in golden.items()}
        save_file(golden, directory / case / "golden.safetensors")
        (directory / case / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "models" / "golden"
    make(target, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    make_decoders(target, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
