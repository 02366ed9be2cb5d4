"""mT5: T5 v1.1 with other defaults, and without scaling of the head's inputs; see `lensjax.models.families.t5`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from lensjax.models.families.t5 import T5, T5Config, table

__all__ = ["MT5", "MT5Config", "table"]


@dataclasses.dataclass(frozen=True)
class MT5Config(T5Config):
    """Configuration of mT5."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 250112,
        "d_ff": 1024,
        "num_layers": 8,
        "num_heads": 6,
        "feed_forward_proj": "gated-gelu",
    }

    @classmethod
    def scales_decoder_outputs(cls, raw: Mapping[str, Any], tied: bool) -> bool:
        """Return False: mT5 never scales them."""
        return False


class MT5(T5):
    """mT5 with its language-model head; see `T5`."""
