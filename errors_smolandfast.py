"""One way to say that something malformed came in: a ValueError with its name and the mend."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def naming(what: str, mend: str = "Download or save it again.", passing: tuple[type, ...] = ()) -> Iterator[None]:
    """Turn whatever a library says of malformed content into a ValueError that names the content and the mend.

    Args:
        passing: Exceptions of exactly these types pass: `(ValueError,)` where our own checks run inside. `OSError` and
            `ImportError` always do.
    """
    try:
        yield
    except (OSError, ImportError):
        raise
    except (
        BaseException
    ) as error:  # libraries raise TypeError, KeyError, AttributeError, RuntimeError, bare Exception ...
        # ... and the tokenizers library, where it panics, a BaseException of a class that cannot be imported.
        if type(error) in passing or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise ValueError(f"{what} cannot be used: {type(error).__name__}: {error}. {mend}") from error
