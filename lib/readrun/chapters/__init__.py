"""Chapters as modules: `readrun.chapters.<slug>` is made from notebooks/<slug>.py when it is imported."""

import sys

from readrun.chapter import Finder

sys.meta_path.append(Finder())
