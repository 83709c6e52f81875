"""`readrun.chapters.<slug>`: a chapter's definitions, also for workers, which import this package."""

from readrun.chapter import install

install()
