"""The weights of a GGUF file, converted to the names, shapes and conventions of a Hugging Face checkpoint."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from lensjax.models.base import LanguageModel
from lensjax.models.checkpoints.gguf.config import ROPE_FACTORS, gguf_config
from lensjax.models.checkpoints.gguf.file import GGUFFile
from lensjax.models.checkpoints.mapping import Tensors, assemble
from lensjax.models.registry import ModelConfig, family_of

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
"""GPT-2's matrices, which its checkpoints store as (in, out) and GGUF as (out, in)."""


class GGUFTensors(Tensors):
    """The tensors of a GGUF file.

    Parameters
    ----------
    file : GGUFFile
    config : ModelConfig
        Configuration of the file, from `gguf_config`.
    """

    described_by: ClassVar[str] = "metadata"
    remedy: ClassVar[str] = "Download the file or convert the model again."

    def __init__(self, file: GGUFFile, config: ModelConfig):
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        file.check_kinds()
        self.file = file
        self.config = config
        self.architecture = file.fields["general.architecture"]
        arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == self.architecture)
        names = get_tensor_name_map(arch, config.layers)
        full_names = {}
        table = family_of(config).table(config)
        for rule in table.rules:
            for pattern in rule.patterns:
                for layer in range(config.layers if "{i}" in pattern else 1):
                    full = table.full(pattern.format(i=layer))
                    full_names[names.get_name(full, try_suffixes=(".weight", ".bias"))] = full
        # Tensors that the model does not have keep their own names, which the error message then lists.
        self.stored = {full_names.get(name, name): name for name in file.tensors if name != ROPE_FACTORS}
        self.shapes = {
            name: file.tensors[stored].shape[::-1] if self._is_transposed(name) else file.tensors[stored].shape
            for name, stored in self.stored.items()
        }

    def _is_transposed(self, name: str) -> bool:
        return self.architecture == "gpt2" and name.endswith(TRANSPOSED)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return entries `start` to `stop` of the first axis of the tensor as stored, float32."""
        values = self.file.read(self.stored[name], start, stop)
        # Gemma multiplies by 1 + the weight of its norms; llama.cpp stores the sum.
        return values - 1 if self.architecture == "gemma3" and name.endswith("norm.weight") else values

    def read(self, name: str, dtype: Any) -> np.ndarray:
        """Return a tensor as an array of `dtype`, in the shape and order of a Hugging Face checkpoint."""
        array = self.read_in_slabs(name, self.file.tensors[self.stored[name]].shape, dtype)
        if self._is_transposed(name):
            return array.T
        short = name.split(".")[-2] if self.architecture == "llama" else None
        if short not in ("q_proj", "k_proj"):
            return array
        # llama.cpp rotates neighbouring features in this architecture, so the two halves of a head are interleaved.
        heads = getattr(self.config, "heads" if short == "q_proj" else "num_key_value_heads")
        pairs = array.reshape(heads, -1, 2, *array.shape[1:])
        return pairs.swapaxes(1, 2).reshape(array.shape)


def load_gguf(file: GGUFFile | str | os.PathLike[str], *, dtype: Any = jnp.float32) -> LanguageModel:
    """Load a model from a GGUF file with any quantisation that the gguf package supports.

    Parameters
    ----------
    file : GGUFFile, str or path
        The file, or its header if it has been read already.
    dtype : dtype of the parameters and of the computation

    Returns
    -------
    LanguageModel

    Raises
    ------
    InputError
        As `GGUFFile.open` and `gguf_config`; also if tensors do not fit the configuration (all of them in one message)
        or cannot be dequantised.
    """
    if not isinstance(file, GGUFFile):
        file = GGUFFile.open(file)
    config = gguf_config(file)
    return assemble(config, GGUFTensors(file, config), dtype, file.path)
