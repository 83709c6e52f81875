"""Read & Run: thin helpers shared by the chapters of the book.

`start` sets a notebook up, `chapter` imports a notebook's definitions, `asset` opens a committed data file.
Everything heavy (torch, numpy, matplotlib, pydantic) is imported by whoever needs it, when it is needed.
"""

from readrun.chapter import chapter
from readrun.paths import asset
from readrun.run import Run, start
from readrun.units import Unit

__all__ = ["Run", "Unit", "asset", "chapter", "start"]
__version__ = "0.1.0"
