"""What libraries do around a verb: they talk, and they run out of memory."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator


def full_memory(error: Exception) -> str | None:
    """Whose memory has run out (GPU or CPU), if that is what the error says."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return "GPU"
    refused = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return "CPU" if refused or isinstance(error, MemoryError) else None


@contextlib.contextmanager
def calm(debug: bool) -> Iterator[None]:
    """Keep libraries' talk off the terminal; what they print goes to stderr."""
    quiet = {
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if not sys.stderr.isatty():
        quiet["TQDM_DISABLE"] = "1"
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        from transformers.utils import logging as chatter

        chatter.disable_progress_bar()
        if not debug:
            warnings.simplefilter("ignore")
            chatter.set_verbosity_error()
            logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
