"""Which implementation runs an op: the caller's choice, part of the jit cache key.

``auto`` runs a Pallas kernel where the device has one that accepts the problem and the XLA path
elsewhere.  ``pallas`` and ``interpret`` never fall back: they raise KernelError with every kernel's
reason.  ``xla`` never uses a kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal, cast, get_args

import jax

from jaxquant.errors import ConfigError

Backend = Literal["auto", "pallas", "xla", "interpret"]

# A user context takes part in jit's cache key, so switching the backend retraces; a plain module
# global would silently keep the old program.
_context = jax.make_user_context(default_value="auto")


def resolve(backend: Backend | None) -> Backend:
    """Return the backend in force: the argument, else the surrounding context, else "auto".

    Raises:
        ConfigError: no such backend.
    """
    chosen = backend if backend is not None else _context.value
    if chosen not in get_args(Backend):
        raise ConfigError(
            "backend", repr(chosen), "no such backend", f"use one of {get_args(Backend)}"
        )
    return cast(Backend, chosen)


@contextlib.contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Run the ops inside the ``with`` block on one backend.

    Raises:
        ConfigError: no such backend.
    """
    with _context(resolve(name)):
        yield
