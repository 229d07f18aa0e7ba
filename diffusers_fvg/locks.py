"""Turns at what pipelines share: some models and tokenizers of diffusers and transformers keep state while they run."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


_locks: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_new_lock = threading.Lock()


@contextmanager
def exclusive(*parts: Any) -> Iterator[None]:
    """Within it no other thread is within one of the same parts.

    The thread itself may enter again for some of them, but for no others: two threads could then wait for each other.

    Args:
        parts: models, tokenizers or schedulers; `None` among them is left out.
    """
    with _new_lock:
        locks = {id(part): _locks.setdefault(part, threading.RLock()) for part in parts if part is not None}
    with ExitStack() as stack:
        # In one order for all threads, so that none waits for another in a circle.
        for _, lock in sorted(locks.items()):
            stack.enter_context(lock)
        yield
