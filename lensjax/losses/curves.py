"""Loss curves: the table candidate x training samples -> test loss, which everything downstream works from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from lensjax._display import listed, table
from lensjax.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Curves:
    """Test losses of several candidates after fine-tuning on several numbers of samples.

    Attributes
    ----------
    names : tuple of str
        One per candidate, unique; M of them.
    sizes : float64 array (S,)
        Training samples, strictly ascending; 0 is the zero-shot loss.
    losses : float64 array (M, S)
        Mean token cross-entropy in nats; NaN is a point that was not measured.
    parameters : float64 array (M,) or None
        Number of weights of each candidate; NaN where unknown.
    families : tuple of str or None
        Model family of each candidate.
    facts : mapping of str to float64 array (M,)
        Other numbers known of each candidate, such as those in `FACT_COLUMNS`; NaN where unknown.
    source : str
        Where the losses come from, for messages.
    notes : tuple of str
        What a reader of the losses should know of how they were read: runs left out, numbers taken from names.

    Examples
    --------
    >>> curves = Curves(("small", "large"), [0, 200, 400], [[3.0, 2.5, 2.3], [2.8, 2.2, float("nan")]])
    >>> len(curves), curves.at(200), curves.visible(200).sizes
    (2, array([2.5, 2.2]), array([  0., 200.]))
    """

    names: tuple[str, ...]
    sizes: np.ndarray
    losses: np.ndarray
    parameters: np.ndarray | None = None
    families: tuple[str, ...] | None = None
    source: str = "curves"
    facts: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "sizes", np.asarray(self.sizes, np.float64))
        object.__setattr__(self, "losses", np.asarray(self.losses, np.float64))
        if self.losses.shape != (len(self.names), len(self.sizes)):
            raise InputError(
                f"{self.source}: losses have shape {self.losses.shape}, but there are {len(self.names)} names "
                f"and {len(self.sizes)} sizes."
            )
        if self.parameters is not None:
            object.__setattr__(self, "parameters", np.asarray(self.parameters, np.float64))
        facts = {name: np.asarray(values, np.float64) for name, values in self.facts.items()}
        object.__setattr__(self, "facts", facts)
        for name, values in facts.items():
            if values.shape != (len(self.names),) or np.isinf(values).any():
                raise InputError(
                    f"{self.source}: {name} is {values.tolist()}; it must be one finite number for each of the "
                    f"{len(self.names)} candidates, NaN where it is not known."
                )
        if np.any(np.diff(self.sizes) <= 0) or np.any(self.sizes < 0):
            raise InputError(f"{self.source}: sizes must be ascending and not negative, found {self.sizes.tolist()}.")
        bad = ~np.isnan(self.losses) & ~(np.isfinite(self.losses) & (self.losses > 0))
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise InputError(
                f"{self.source}: loss of {self.names[row]} at {self.sizes[column]:g} samples is "
                f"{self.losses[row, column]:g}; losses are positive, finite numbers (nats per token)."
            )

    def __len__(self) -> int:
        return len(self.names)

    def visible(self, largest: float) -> Curves:
        """Return the curves without the losses at more than `largest` samples."""
        keep = self.sizes <= largest
        return dataclasses.replace(self, sizes=self.sizes[keep], losses=self.losses[:, keep])

    def at(self, size: float) -> np.ndarray:
        """Return the losses (M,) measured at exactly `size` samples, NaN where there is none."""
        match = np.flatnonzero(self.sizes == size)
        if not len(match):
            return np.full(len(self.names), np.nan)
        return self.losses[:, match[0]]

    def rows(self, which: list[int] | np.ndarray) -> Curves:
        """Return the curves of some of the candidates, by position."""
        which = np.asarray(which)
        return dataclasses.replace(
            self,
            names=tuple(self.names[i] for i in which),
            losses=self.losses[which],
            parameters=None if self.parameters is None else self.parameters[which],
            families=None if self.families is None else tuple(self.families[i] for i in which),
            facts={name: values[which] for name, values in self.facts.items()},
        )

    def __repr__(self) -> str:
        sizes = f"{self.sizes[0]:g} to {self.sizes[-1]:g} samples" if len(self.sizes) else "no sizes"
        return f"Curves({len(self.names)} candidates: {listed(self.names)}; {sizes}; {self.source})"

    def _repr_html_(self) -> str:
        """Show the table in a notebook."""
        rows = ((name, *map(float, losses)) for name, losses in zip(self.names, self.losses, strict=True))
        return table(self.source, ["candidate", *(f"{size:,.0f}" for size in self.sizes)], rows)


FACT_COLUMNS = ("pl_alpha", "e_tpl_alpha", "e_tpl_lambda", "log_me")
"""What selectors know of candidates beside losses: see `lensjax.selectors.nlp_metrics` (means over the matrices) and
`lensjax.selectors.log_me`."""
