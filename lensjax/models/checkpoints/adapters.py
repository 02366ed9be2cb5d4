"""Saving and loading adapters in the format of peft: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lensjax._files import read_json
from lensjax.errors import InputError
from lensjax.models.base import Seq2SeqConfig
from lensjax.models.execution import unstack_layers
from lensjax.models.lora import Lora, adaptable, adapters, with_adapters
from lensjax.models.registry import Table, family_of

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

PLAIN: dict[str, Any] = {
    "bias": "none",
    "use_dora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_bias": False,
    "exclude_modules": None,
    "trainable_token_indices": None,
}
"""Settings of peft that change the computation, with the values that mean plain LoRA."""

REBASED = ("corda", "loftq", "lora_ga", "olora", "pissa")
"""Values of peft's init_lora_weights (or their beginnings) that modify the base weights, which are not saved."""


def save_lora(model: Any, directory: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None) -> None:
    """Write the adapters of a model without its other weights, in the format of peft.

    Parameters
    ----------
    model : lensjax.models.LanguageModel
        From `add_lora`.
    directory : str or path
        Created if it does not exist; files of the same names are replaced.
    base : str or path, optional
        Id or directory of the model without adapters, for base_model_name_or_path.

    Raises
    ------
    InputError
        If the model has no adapters.
    """
    if model.lora is None:
        raise InputError("The model has no adapters to save; save all its weights with save_pretrained.")
    lora: Lora = model.lora
    model = unstack_layers(model)
    known, table = adaptable(model), family_of(model.config).table(model.config)
    tensors: dict[str, np.ndarray] = {}
    used: list[str] = []
    for name, adapter in adapters(model).items():
        used += known[name]
        # All experts of a layer share one `Adapter`, with a leading axis.
        a, b = (np.asarray(matrix[...]) for matrix in (adapter.lora_a, adapter.lora_b))
        pairs = zip(a, b, strict=True) if a.ndim == 3 else [(a, b)]
        for theirs, (down, up) in zip(known[name], pairs, strict=True):
            tensors[f"{PREFIX}{theirs}.lora_A.weight"] = np.ascontiguousarray(down.T)
            tensors[f"{PREFIX}{theirs}.lora_B.weight"] = np.ascontiguousarray(up.T)
    settings = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if isinstance(model.config, Seq2SeqConfig) else "CAUSAL_LM",
        "base_model_name_or_path": None if base is None else os.fspath(base),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilised,
        "target_modules": _targets(used, [theirs for names in known.values() for theirs in names]),
        "fan_in_fan_out": _stores_inputs_first(table, next(iter(adapters(model)))),
        "init_lora_weights": True,
        "inference_mode": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        **PLAIN,
    }
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    (target / WEIGHTS).chmod(0o644)  # safetensors creates files that only their owner can read
    (target / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")


def _targets(used: list[str], known: list[str]) -> list[str]:
    """Return the last parts of the names if they match the same modules, otherwise the full names."""
    short = {name.rpartition(".")[2] for name in used}
    matched = {name for name in known if name.rpartition(".")[2] in short}
    return sorted(short if matched == set(used) else used)


def _stores_inputs_first(table: Table, name: str) -> bool:
    """Return whether the checkpoint stores matrices as (in, out), as GPT-2's does."""
    try:
        rule = table.sources(f"{name}.kernel")[0]
    except LookupError:
        return False  # experts; no family with experts stores (in, out)
    return rule.load([np.zeros((1, 2))]).shape == (1, 2)


def load_lora(model: Any, directory: str | os.PathLike[str]) -> Any:
    """Return the model with adapters read from a directory that peft or `save_lora` wrote.

    Parameters
    ----------
    model : lensjax.models.LanguageModel
        Without adapters. It is not changed, and shares the arrays of its weights with the result.
    directory : str or path
        With adapter_config.json and adapter_model.safetensors.

    Returns
    -------
    model of the same class; see `add_lora`.

    Raises
    ------
    InputError
        If a file is missing or unreadable, the adapters are not plain LoRA, or they do not fit the model (with all
        problems in one message).
    """
    source = Path(directory)
    config = _settings(source)
    try:
        tensors = load_file(source / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{source / WEIGHTS}: cannot be read ({error}). Adapters in a pickled file (adapter_model.bin) are not "
            "opened; load and save them once with peft, which writes safetensors."
        ) from error
    matrices, problems = {}, []
    plain = unstack_layers(model)
    for name, theirs in adaptable(plain).items():
        pairs = [(f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight") for module in theirs]
        needed = [part for pair in pairs for part in pair]
        missing = [part for part in needed if part not in tensors]
        if not missing:
            matrices[name] = [tuple(tensors.pop(part).T for part in pair) for pair in pairs]
        elif len(missing) < len(needed):
            problems += [f"missing: {part}" for part in missing]
            tensors = {part: value for part, value in tensors.items() if part not in needed}
    problems += [f"unused: {part}" for part in tensors]
    if not matrices and not problems:
        problems.append("there is no adapter in the file")
    lora = Lora(
        config["r"],
        float(config["lora_alpha"]),
        config.get("lora_dropout", 0.0),
        tuple(matrices),
        rank_stabilised=config.get("use_rslora", False),
    )
    adapted = plain if problems else with_adapters(plain, lora, list(matrices), jax.random.key(0))
    for name, adapter in adapters(adapted).items():
        for matrix, parts in zip((adapter.lora_a, adapter.lora_b), zip(*matrices[name], strict=True), strict=True):
            shape = parts[0].shape if matrix[...].ndim == 2 else (len(parts), *parts[0].shape)
            if shape != matrix.shape:
                problems.append(f"wrong shape: {name} needs {matrix.shape} and the file has {shape}")
                continue
            matrix[...] = jnp.asarray(parts[0] if matrix[...].ndim == 2 else np.stack(parts), matrix.dtype)
    if problems:
        raise InputError(
            f"{source}: the adapters do not fit this {model.config.model_type} model, {len(problems)} "
            f"problem{'s' if len(problems) > 1 else ''}:\n  " + "\n  ".join(problems)
        )
    return adapted


def _settings(source: Path) -> dict[str, Any]:
    try:
        config = read_json(source / CONFIG)
    except (OSError, InputError) as error:
        raise InputError(f"{source / CONFIG}: cannot be read ({error}); name a directory that peft wrote.") from error
    wrong = [] if config.get("peft_type") == "LORA" else [f"peft_type is {config.get('peft_type')!r}"]
    wrong += [f"{name} is {config[name]!r}" for name, value in PLAIN.items() if config.get(name) not in (None, value)]
    start, tokens = config.get("init_lora_weights"), config.get("alora_invocation_tokens")
    wrong += [f"init_lora_weights is {start!r}"] if str(start).lower().startswith(REBASED) else []
    wrong += [f"alora_invocation_tokens is {tokens!r}"] if tokens else []
    wrong += [f"{name} is missing" for name in ("r", "lora_alpha") if name not in config]
    if wrong:
        raise InputError(f"{source / CONFIG}: {', '.join(wrong)}; only plain LoRA adapters are supported.")
    return config
