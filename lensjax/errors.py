"""The errors lensjax raises on purpose."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is complete in itself: it names the thing, the value found and the remedy.
    The command line prints it after ``lensjax.select: `` and exits with status 2.

    Examples
    --------
    >>> from lensjax import read_losses
    >>> try:
    ...     read_losses("published:nothing")
    ... except InputError as error:
    ...     print(error)
    published:nothing: no such published table. There are: published:flan, published:gigaword, published:wmt19.
    """


class SelectionError(RuntimeError):
    """A selection could not be finished for a reason that showed only while it ran; finished runs are on disk."""


class UnsupportedBackendError(RuntimeError):
    """The installed jaxlib is known to compute wrong derivatives on this backend."""
