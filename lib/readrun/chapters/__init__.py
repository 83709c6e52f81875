"""`readrun.chapters.<slug>`: the definitions of a chapter's notebook as an importable module.

Importing this package installs the finder, so that a worker process which unpickles a chapter's function finds it.
"""

from readrun.chapter import install

install()
