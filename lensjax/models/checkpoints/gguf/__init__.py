"""GGUF files, read without torch: configuration, weights and tokenizer.

References
----------
The GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from lensjax.models.checkpoints.gguf.config import gguf_config
from lensjax.models.checkpoints.gguf.file import GGUFFile, is_gguf
from lensjax.models.checkpoints.gguf.tokenizer import gguf_tokenizer
from lensjax.models.checkpoints.gguf.weights import GGUFTensors, load_gguf

__all__ = ["GGUFFile", "GGUFTensors", "gguf_config", "gguf_tokenizer", "is_gguf", "load_gguf"]
