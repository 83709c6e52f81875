"""What Jupyter Book's settings cannot say: pages that ask no other site, buttons that fit the checkout."""

from __future__ import annotations

import os
import re
import subprocess

FORGES = ("github.com", "gitlab.com", "codeberg.org", "bitbucket.org")


def repository(remote: str) -> str:
    """Web address of a git remote on a public forge; "" for any other (a local path, a private host)."""
    address = r"(?:https://(?:[^@/]+@)?|ssh://git@|git@)([\w.-]+)[:/]([\w./-]+?)(?:\.git)?/?"
    found = re.fullmatch(address, remote.strip())
    return f"https://{found[1]}/{found[2]}" if found and found[1] in FORGES else ""


def _git(*words: str) -> str:
    top = os.environ.get("READRUN_ROOT") or os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run(["git", "-C", top, *words], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def settings(app, config):
    """Drop scripts that are not for every page, and add the buttons that the repository's host allows."""
    config.html_js_files = [
        file for file in config.html_js_files if "vendor/" not in (file if isinstance(file, str) else file[0])
    ]
    url = repository(os.environ.get("READRUN_REPOSITORY") or _git("remote", "get-url", "origin"))
    if not url:
        return
    options = config.html_theme_options
    options |= {
        "repository_url": url,
        "repository_branch": _git("rev-parse", "--abbrev-ref", "HEAD") or "main",
        "path_to_docs": "book",
        "use_repository_button": True,
        "use_issues_button": True,
    }
    if url.startswith(("https://github.com/", "https://gitlab.com/")):
        binder = {"binderhub_url": "https://mybinder.org", "notebook_interface": "jupyterlab"}
        options["launch_buttons"] = binder
    if url.startswith("https://github.com/"):
        options["launch_buttons"]["colab_url"] = "https://colab.research.google.com"


def page(app, pagename, templatename, context, doctree):
    """Leave out thebe, whose script only names another site, and point launch buttons at notebooks/."""
    context["script_files"] = [
        file
        for file in context["script_files"]
        if not any("thebe" in str(part).lower() for part in (file, getattr(file, "attributes", "")))
    ]
    for group in context.get("header_buttons", []):
        for button in group.get("buttons", [group]) if isinstance(group, dict) else []:
            if "url" in button:
                button["url"] = button["url"].replace("book/chapters/", "notebooks/")


def setup(app):
    app.connect("config-inited", settings, priority=900)
    app.connect("html-page-context", page, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True, "version": "1"}
