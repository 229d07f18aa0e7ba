"""Locks on components that pipelines share: some models and tokenizers keep state while they run."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase


_locks: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_new_lock = threading.Lock()


def lockable(components: Iterable[Any]) -> list[Any]:
    """Returns the components that need a lock while a pipeline runs: models and tokenizers."""
    return [part for part in components if isinstance(part, (torch.nn.Module, PreTrainedTokenizerBase))]


@contextmanager
def exclusive(*parts: Any) -> Iterator[None]:
    """Holds the locks of `parts` for the block, so that no other thread uses them.

    Within the block, the same thread may lock some of these parts again, but no others: two threads could then wait for each
    other.

    Args:
        parts: models and tokenizers; `None` is ignored.
    """
    with _new_lock:
        locks = {id(part): _locks.setdefault(part, threading.RLock()) for part in parts if part is not None}
    with ExitStack() as stack:
        # All threads lock in the same order, which prevents deadlocks.
        for _, lock in sorted(locks.items()):
            stack.enter_context(lock)
        yield
