"""`readrun.chapters.<slug>`: a chapter's definitions, also for worker processes, which import this package."""

from readrun.chapter import install

install()
