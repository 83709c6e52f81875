"""Units of which none takes the others with it: what fails is told at the end."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from readrun.run import Run
    from readrun.units import Unit


class Attempts:
    """`unit` is `run.unit`, except that an error waits for `check`; the unit is then without a result."""

    def __init__(self, run: Run) -> None:
        self.run, self.errors = run, dict[str, str]()  # texts: an exception would hold a GPU's memory

    def unit(self, fn: Callable[..., Any], **arguments: Any) -> Unit:
        """`run.unit(fn, **arguments)`, done or not. Raises at once for arguments that make no unit."""
        try:
            return self.run.unit(fn, **arguments)
        except Exception as error:  # whatever a library or a GPU raises
            asked = [u for u in self.run.units if u.fn == fn.__name__ and u.arguments == arguments]
            if not asked:
                raise
            self.errors[asked[-1].id] = f"{type(error).__name__}: {error}"[:300]
            print(f"unit {asked[-1].id} failed:\n{traceback.format_exc()[-3000:]}")
        return asked[-1]

    def check(self) -> None:
        """Raise RuntimeError that names the failed units and their errors, if there are any."""
        if self.errors:
            told = "; ".join(f"{name}: {error}" for name, error in self.errors.items())
            raise RuntimeError(f"{len(self.errors)} units failed: {told}")
