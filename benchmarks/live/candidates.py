"""The live benchmark's candidates: 14 small models of 7 families, pre-trained on different text."""

from __future__ import annotations

import dataclasses
from typing import Any

LENGTH = 128


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One model: family, texts, shape, schedule."""

    name: str
    family: str
    texts: tuple[str, ...]
    width: int
    layers: int
    learning_rate: float
    steps: int
    heads: int = 4

    def config(self, vocabulary: int) -> dict[str, Any]:
        """Contents of config.json."""
        ids = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        ids["tie_word_embeddings"] = True
        if self.family == "gpt2":
            own = {"n_positions": LENGTH, "n_embd": self.width, "n_layer": self.layers, "n_head": self.heads}
            own |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        elif self.family == "t5":
            own = {"d_model": self.width, "d_kv": self.width // self.heads, "num_heads": self.heads}
            own |= {"d_ff": 4 * self.width, "num_layers": self.layers, "num_decoder_layers": self.layers}
            own |= {"dropout_rate": 0.0, "decoder_start_token_id": 0}
        elif self.family == "bart":
            own = {"d_model": self.width, "max_position_embeddings": LENGTH, "decoder_start_token_id": 0}
            for side in ("encoder", "decoder"):
                own |= {f"{side}_layers": self.layers, f"{side}_attention_heads": self.heads}
                own |= {f"{side}_ffn_dim": 4 * self.width}
            own |= dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
        else:
            own = {"hidden_size": self.width, "num_hidden_layers": self.layers, "num_attention_heads": self.heads}
            own |= {"num_key_value_heads": self.heads, "head_dim": self.width // self.heads}
            own |= {"intermediate_size": 3 * self.width, "ffn_dim": 4 * self.width}
            own |= {"max_position_embeddings": LENGTH, "word_embed_proj_dim": self.width, "dropout": 0.0}
        return {"model_type": self.family} | ids | own


ALL = ("novels", "bible", "lexicon")
CANDIDATES = (
    Candidate("gpt2-bible-48", "gpt2", ("bible",), 48, 2, 4e-3, 2_000),
    Candidate("gpt2-novels-96", "gpt2", ("novels",), 96, 3, 3e-3, 2_000),
    Candidate("gpt2-all-128", "gpt2", ALL, 128, 4, 2e-3, 1_500),
    Candidate("llama-lexicon-64", "llama", ("lexicon",), 64, 2, 4e-3, 2_000),
    Candidate("llama-novels-128", "llama", ("novels",), 128, 3, 2e-3, 1_500),
    Candidate("llama-all-96", "llama", ALL, 96, 3, 3e-3, 2_000),
    Candidate("opt-bible-64", "opt", ("bible",), 64, 2, 4e-3, 2_000),
    Candidate("opt-all-64", "opt", ALL, 64, 2, 4e-3, 2_000),
    Candidate("qwen2-novels-64", "qwen2", ("novels",), 64, 2, 4e-3, 2_000),
    Candidate("qwen2-lexicon-64", "qwen2", ("lexicon",), 64, 3, 4e-3, 2_000),
    Candidate("phi-all-64", "phi", ALL, 64, 3, 3e-3, 2_000),
    Candidate("t5-novels-64", "t5", ("novels",), 64, 2, 4e-3, 2_000),
    Candidate("t5-all-64", "t5", ALL, 64, 3, 3e-3, 2_000),
    Candidate("bart-bible-64", "bart", ("bible",), 64, 2, 4e-3, 2_000),
)
