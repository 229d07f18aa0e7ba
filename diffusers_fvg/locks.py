"""Turns at what pipelines share: some models and tokenizers of diffusers and transformers keep state while they run."""

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
    """Of a pipeline's components those that a run takes for itself: models and tokenizers."""
    return [part for part in components if isinstance(part, (torch.nn.Module, PreTrainedTokenizerBase))]


@contextmanager
def exclusive(*parts: Any) -> Iterator[None]:
    """Within it no other thread is within one of the same parts.

    The thread itself may enter again for some of them, but for no others: two threads could then wait for each other.

    Args:
        parts: models and tokenizers; `None` among them is left out.
    """
    with _new_lock:
        locks = {id(part): _locks.setdefault(part, threading.RLock()) for part in parts if part is not None}
    with ExitStack() as stack:
        # In one order for all threads, so that none waits for another in a circle.
        for _, lock in sorted(locks.items()):
            stack.enter_context(lock)
        yield
