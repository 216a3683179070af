"""Train the toy model of attention-head features and watch singular vectors align with them (arXiv 2602.13524).

From Python, the commands are ``svf_lightning.fit(...)`` and ``svf_lightning.replay(...)``, a run directory is
``svf_lightning.Run(path)``, and ``svf_lightning.open_trajectory(path)`` is everything that it holds.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from svf_lightning.api import Run, fit
    from svf_lightning.trajectory import open_trajectory

__all__ = ["Run", "__version__", "fit", "open_trajectory", "replay"]  # replay: the package can be called

_FROM = {"Run": "api", "fit": "api", "open_trajectory": "trajectory", "replay": "replay"}


def __getattr__(name: str) -> Any:
    """What is imported when it is first used, as that takes seconds."""
    from importlib import import_module

    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_FROM[name]}")
    return module if name == _FROM[name] else getattr(module, name)


class CallablePackage(ModuleType):
    """The package ``svf_lightning.replay``, which is also a command: ``svf_lightning.replay("tiny_suite")``."""

    def __call__(self, *args: Any, **settings: Any) -> Run:
        """Run the command; see :func:`svf_lightning.api.replay`."""
        from svf_lightning.api import replay

        return replay(*args, **settings)


def __dir__() -> list[str]:
    """The public names."""
    return sorted({*globals(), *__all__})
