"""Cells, names followed through code, content keys."""

from __future__ import annotations

import ast
import subprocess
import symtable
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from readrun import content, paths

LIB = sorted(paths.library().glob("*.py"))
NOTEBOOK = '''# ---
# jupyter:
#   kernelspec:
#     name: python3
# ---

# %% [markdown]
# # A title
#
# Text with $x$.

# %% tags=["parameters"]
profile = ""
seed = 0
template = "r1"

# %%
# %matplotlib inline
import readrun
from readrun import rl

# %% A title of its own tags=["figure", "hide-input"]
print("drawn")

# %%

def double(x):
    """Twice."""
    return 2 * x  # a comment
'''


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("READRUN_ROOT", str(tmp_path))
    monkeypatch.delenv("READRUN_PROFILE", raising=False)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/toy.py").write_text(NOTEBOOK)
    return tmp_path


def edit(book: Path, old: str, new: str) -> None:
    file = book / "notebooks/toy.py"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def library(book: Path, monkeypatch: pytest.MonkeyPatch, **modules: str) -> None:
    """A `readrun` of the test's own: {module: source}."""
    (book / "lib").mkdir(exist_ok=True)
    for name, source in modules.items():
        (book / "lib" / f"{name}.py").write_text(source)
    monkeypatch.setattr(paths, "library", lambda: book / "lib")
    content.modules_in.cache_clear()


# ---------------------------------------------------------------- cells


def test_cells_have_sources_tags_kinds_and_lines(book: Path) -> None:
    cells = content.cells("toy")
    assert [c.kind for c in cells] == ["markdown", "code", "code", "code", "code"]
    assert cells[0].source == "# A title\n\nText with $x$."
    assert cells[2].source.startswith("%matplotlib inline\nimport readrun")
    assert [c.tags for c in cells[1:]] == [("parameters",), (), ("figure", "hide-input"), ()]
    assert [c.computes for c in cells] == [False, False, True, False, True]
    lines = NOTEBOOK.splitlines()
    assert lines[cells[0].first_line - 1] == "# # A title"
    assert lines[cells[4].first_line - 1] == "def double(x):" == cells[4].source.splitlines()[0]


TEXT = st.text(st.sampled_from("ab =()#:.,'\n $%!"), max_size=40).map(str.strip)
TEXT = TEXT.filter(
    lambda text: not text.startswith("#!")
)  # jupytext takes that for a shebang and drops the #
CODE = st.sampled_from(
    [
        "x = 1",
        "def f(a):\n    # why\n\n    return a",
        "# only a comment",
        "%matplotlib inline\ny = 2",
        "!ls",
        "x = '''\n\n'''",
    ]
)
TAGS = st.lists(st.sampled_from(["figure", "widget", "parameters", "hide-input"]), max_size=2, unique=True)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.one_of(st.tuples(st.just("markdown"), TEXT), st.tuples(st.just("code"), CODE)), max_size=6),
    TAGS,
)
def test_cells_are_those_of_jupytext(pieces: list[tuple[str, str]], tags: list[str]) -> None:
    import jupytext
    from nbformat import v4

    new = {"markdown": v4.new_markdown_cell, "code": v4.new_code_cell}
    notebook = v4.new_notebook(
        cells=[new[kind](text, metadata={"tags": tags} if tags else {}) for kind, text in pieces]
    )
    script = jupytext.writes(notebook, fmt="py:percent")
    read = jupytext.reads(script, fmt="py:percent").cells
    ours = content.split_percent(script)
    assert [(c.kind, c.source) for c in ours] == [(c.cell_type, c.source.rstrip("\n")) for c in read]
    assert [list(c.tags) for c in ours] == [c.metadata.get("tags", []) for c in read]


def test_committed_notebooks_are_read_like_jupytext_reads_them() -> None:
    import jupytext

    for script in sorted((Path(__file__).parents[1] / "notebooks").glob("*.py")):
        read = jupytext.reads(script.read_text(), fmt="py:percent").cells
        ours = content.split_percent(script.read_text())
        assert [(c.kind, c.source) for c in ours] == [(c.cell_type, c.source) for c in read], script.name


# ---------------------------------------------------------------- trees

SNIPPET = '''
import os as operating, readrun.rl
from collections import *

@decorate(1.5e-7, -0.1, key=f"a{b!r:>{width}}c" "d")
def f(x: int = 3, /, *args, k=None, **rest) -> "str":
    """Doc."""
    global counter
    counter += 1
    try:
        with open(x) as (file, _), g():
            yield [y async for y in z if y > 1j] or (lambda q: q ** 2)(x)
    except* (A, B) as error:
        raise C from error
    match x:
        case {"a": [1, *others], **more} | Point(x=0) as whole if whole:
            pass
    return {**rest, 'b': x[1:2, ...], "c": b"bytes"} if not x else {w := 1}

class D(E, metaclass=M):
    n: int = 0x10
    async def m(self): await self; nonlocal_ = 1_000_000; assert nonlocal_, "m"; del self.x
'''


def test_canonical_text_does_not_depend_on_the_python_version() -> None:
    """The digest was computed on Python 3.11; that of `ast.dump` differs on 3.12 and on 3.13."""
    assert content.digest(content.canonical(ast.parse(SNIPPET))) == GOLDEN


GOLDEN = "3ad404b06f95b7ed2e2a7643899e3605d508951321655945e639ad5f28272e54"


@pytest.mark.parametrize("file", LIB, ids=lambda f: f.stem)
def test_canonical_text_ignores_formatting_comments_and_docstrings_only(file: Path) -> None:
    tree = ast.parse(file.read_text())
    text = content.canonical(tree)
    assert text == content.canonical(ast.parse("# new\n" + ast.unparse(tree)))
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, int)
            and not isinstance(node.value, bool)
        ):
            node.value += 1
            assert content.canonical(tree) != text
            break


@pytest.mark.parametrize("file", LIB, ids=lambda f: f.stem)
def test_free_names_are_those_of_the_compiler(file: Path) -> None:
    def read(table: symtable.SymbolTable) -> set[str]:
        inner = {name for child in table.get_children() for name in read(child)}
        symbols = [s for s in table.get_symbols() if s.is_referenced()]
        return inner | {s.get_name() for s in symbols if s.is_global() or table.get_type() == "module"}

    checked = 0
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            for part in ast.walk(node):  # whether annotations are read differs between versions
                if isinstance(part, (ast.arg, ast.FunctionDef)):
                    setattr(part, "annotation" if isinstance(part, ast.arg) else "returns", None)
                elif isinstance(part, ast.AnnAssign):
                    part.annotation = ast.Constant(0)
            table = symtable.symtable(ast.unparse(node), "f", "exec")
            free = {name for name in content.scope(node)[0] if not name.startswith("global ")}
            assert read(table) - {"__class__"} <= free, node.name
            declared = {
                name for part in ast.walk(node) if isinstance(part, ast.Global) for name in part.names
            }
            fields = declared | {
                s.target.id for s in getattr(node, "body", []) if isinstance(s, ast.AnnAssign)
            }
            assert free - fields <= read(table), node.name
            checked += 1
    assert checked or file.stem == "__init__"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("def f(a, b=B, *c, d: T = D, **e): return a + b + g(c, d, e)", {"B", "D", "T", "g"}),
        ("def f():\n x = 1\n def inner(): return x + y\n return inner", {"y"}),
        ("def f(): return [x for x in xs if x > t]", {"xs", "t"}),
        ("def f(model):\n def g():\n  model = 1\n  return model\n return model", set()),
        ("def f():\n def g():\n  model = 1\n return model", {"model"}),
        ("class A(Base):\n size = SIZE\n def m(self): return size + self.size", {"Base", "SIZE", "size"}),
        ("def f():\n try: pass\n except E as e: print(e)", {"E", "print"}),
        ("def f(x):\n match x:\n  case {'a': b, **r}: return b, r\n  case [*z]: return z", set()),
        ("def f():\n global g\n g = 1", {"g", "global g"}),
        ("f = lambda x, y=Y: x + z", {"Y", "z"}),
        ("def f(x=x): return x", {"x"}),
        ("def f():\n import os.path as p, sys\n return p, sys, json", {"json"}),
        ("def f(): return (y := 2) + y + w", {"w"}),
        ("@wrap(N)\ndef f(): pass", {"wrap", "N"}),
    ],
)
def test_free_names(source: str, names: set[str]) -> None:
    assert content.scope(ast.parse(source).body[0])[0] == names


@pytest.mark.parametrize(
    ("source", "binds", "changes", "touches"),
    [
        ("a, (b, *c) = f(d)", "abc", "", ""),
        ("a = a + 1", "", "a", ""),
        ("a += 1", "", "a", ""),
        ("a['k'].x = 1", "", "a", ""),
        ("del a['k']", "", "a", ""),
        ("for i in range(3):\n a[i] = f(i)", "", "ai", ""),
        ("a.update(b)", "", "", "ab"),
        ("t.fill_(0)", "", "", "t"),
        ("y = t.add_(1)", "y", "", "t"),
        ("torch.set_default_dtype(d)", "", "", ""),
        ("print(a)", "", "", ""),
        ("train(a, f(b))", "", "", "a"),
        ("def f(): a.append(1)", "f", "", ""),
        ("if x:\n def f(): pass", "", "f", ""),
    ],
)
def test_effects(source: str, binds: str, changes: str, touches: str) -> None:
    found = content.effects(ast.parse(source).body[0])
    ignored = {"torch", "train", "d"}
    assert [n - ignored for n in found] == [set(binds), set(changes), set(touches)]


def test_setters_of_a_library_count_for_what_uses_it() -> None:
    assert "torch" in content.effects(ast.parse("torch.set_default_dtype(x)").body[0])[1]
    assert "torch" in content.effects(ast.parse("torch.backends.cuda.matmul.allow_tf32 = True").body[0])[1]
    assert "torch" not in content.effects(ast.parse("torch.manual_seed(0)").body[0])[1]


# ---------------------------------------------------------------- content key


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Text with $x$.", "Other text."),
        ("# a comment", "# another"),
        ('"""Twice."""', '"""Two times."""'),
        ("2 * x", "(2  *  x)"),
        ('print("drawn")', 'print("drawn better")'),
        ("seed = 0", "seed = 7"),
        ("import readrun\nfrom", "import readrun\n\n# %%\nfrom"),
    ],
)
def test_content_key_stays(book: Path, old: str, new: str) -> None:
    before = content.content_key("toy")
    edit(book, old, new)
    assert content.content_key("toy") == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2 * x", "3 * x"),
        ('template = "r1"', 'template = "none"'),
        ('tags=["figure", "hide-input"]', 'tags=["hide-input"]'),
        ("from readrun import rl", "from readrun import train"),
    ],
)
def test_content_key_changes(book: Path, old: str, new: str) -> None:
    before = content.content_key("toy")
    edit(book, old, new)
    assert content.content_key("toy") != before


def test_parameters_enter_by_value(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = content.content_key("toy")
    run = {
        "profile": "cpu",
        "seed": 5,
        "seeds": 2,
        "device": "cuda",
        "only": "none",
        "out": "x",
        "template": "r1",
    }
    assert content.content_key("toy", run | {"checkpoint": ""}) == key
    assert content.content_key("toy", {"profile": "smoke"}) != key
    assert content.content_key("toy", {"template": "none"}) != key
    assert content.content_key("toy", {"checkpoint": "org/name"}) != key
    monkeypatch.setenv("READRUN_PROFILE", "smoke")
    assert content.content_key("toy") == content.content_key("toy", {"profile": "smoke"})


def test_a_local_checkpoint_counts_with_its_files(book: Path) -> None:
    (book / "mine").mkdir()
    (book / "mine/config.json").write_text("{}")
    first = content.content_key("toy", {"checkpoint": str(book / "mine")})
    (book / "mine/config.json").write_text('{"a": 1}')
    assert content.content_key("toy", {"checkpoint": str(book / "mine")}) != first


def test_only_the_active_profiles_settings_count(book: Path) -> None:
    edit(book, "def double", "S = run.settings(smoke=dict(n=1), cpu=dict(n=2), gpu=dict(n=3))\n\ndef double")
    keys = {p: content.content_key("toy", {"profile": p}) for p in content.PROFILES}
    edit(book, "smoke=dict(n=1)", "smoke=dict(n=9)")
    after = {p: content.content_key("toy", {"profile": p}) for p in content.PROFILES}
    assert {p for p in keys if keys[p] != after[p]} == {"smoke"}


def test_modules_count_transitively_without_presentation_and_core(
    book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {
        "rl": "from . import deep\nfrom readrun.plots import style",
        "deep": "import readrun.deeper as d\nX = 1",
    }
    sources |= {
        "deeper": "import readrun\nreadrun.attribute.f()\n",
        "attribute": "Y = 1",
        "plots": "Z = 1",
        "run": "W = 1",
    }
    library(book, monkeypatch, **sources, other="V = 1")
    first, shown = content.content_key("toy"), content.render_key("toy")
    assert set(content.modules_reached(ast.parse("from readrun import rl").body)) == {
        "rl",
        "deep",
        "deeper",
        "attribute",
    }
    other = ast.parse("import readrun as rr\nrr.rl.f()").body
    assert {"rl", "deep", "other"} < set(content.modules_reached(other)), "another name for the package"
    for module, counts in {"deep": 1, "deeper": 1, "attribute": 1, "plots": 0, "run": 0, "other": 0}.items():
        old = (book / f"lib/{module}.py").read_text()
        (book / f"lib/{module}.py").write_text(old + "\nNEW = 1\n")
        assert (content.content_key("toy") != first) == bool(counts), module
        (book / f"lib/{module}.py").write_text(old + "\n# a comment\n")
        assert content.content_key("toy") == first, module
        (book / f"lib/{module}.py").write_text(old)
    assert content.render_key("toy") == shown


def test_assets_count(book: Path) -> None:
    edit(book, "    return 2 * x", "    return open(readrun.asset('shared/words.txt'))")
    for name in ("toy/own.txt", "shared/words.txt", "shared/other.txt"):
        (book / "data/assets" / name).parent.mkdir(parents=True, exist_ok=True)
        (book / "data/assets" / name).write_text("a")
    for name, counts in {
        "toy/own.txt": 1,
        "shared/words.txt": 1,
        "shared/other.txt": 0,
        "toy/MANIFEST.json": 0,
    }.items():
        before = content.content_key("toy")
        (book / "data/assets" / name).write_text("changed")
        assert (content.content_key("toy") != before) == bool(counts), name


def test_a_syntax_error_names_the_line_of_the_script(book: Path) -> None:
    edit(book, "2 * x", "2 *")
    with pytest.raises(SyntaxError) as caught:
        content.content_key("toy")
    assert NOTEBOOK.splitlines()[caught.value.lineno - 1].startswith("    return 2 * x")


# ---------------------------------------------------------------- render key, speed


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [("Text with $x$.", "Other.", False), ("# a comment", "# another", True), ('"drawn"', '"better"', True)],
)
def test_render_key_of_edits(book: Path, old: str, new: str, changes: bool) -> None:
    before = content.render_key("toy")
    edit(book, old, new)
    assert (content.render_key("toy") != before) == changes


def test_render_key_follows_presentation_claims_and_record(
    book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(book, 'print("drawn")', "from readrun import plots")
    library(book, monkeypatch, plots="from readrun import media", media="A = 1", rl="B = 1", publish="C = 1")
    key, own = content.render_key("toy"), content.content_key("toy")
    for file in (
        "lib/media.py",
        "lib/template/verdicts.html",
        "data/papers/toy.yml",
        "data/results/toy.gpu.json",
        "data/results/toy.gpu.npz",
    ):
        (book / file).parent.mkdir(parents=True, exist_ok=True)
        (book / file).write_text("# changed")
        assert content.render_key("toy") != key, file
        key = content.render_key("toy")
    (book / "lib/publish.py").write_text("C = 2")  # draws nothing
    (book / "lib/rl.py").write_text("B = 2")  # not presentation
    assert content.render_key("toy") == key
    assert content.content_key("toy") != own


def test_keys_of_a_book_of_22_long_chapters_are_fast_and_need_no_torch(book: Path) -> None:
    cell = "\n# %% [markdown]\n# text\n\n# %%\ndef f{i}(x, y=None):\n"
    cell += "    z = [x * k for k in range({i})]\n    return {n} + z\n"
    for n in range(22):
        body = "".join(cell.format(i=i, n=n) for i in range(140))
        (book / f"notebooks/c{n}.py").write_text(NOTEBOOK + body)
    assert body.count("\n") > 900
    program = (
        "import sys, time; start = time.process_time()\nfrom readrun import content, paths\n"
        "keys = {(content.content_key(s), content.render_key(s)) for s in paths.chapters()}\n"
        "print(len(keys), time.process_time() - start, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert out[0] == "23"  # with the fixture's own
    assert float(out[1]) < 2.0 and out[2:] == ["False", "False"], out


def test_import_is_fast() -> None:
    program = "import time; start = time.process_time(); import readrun; print(time.process_time() - start)"
    seconds = min(float(subprocess.check_output([sys.executable, "-c", program])) for _ in range(3))
    assert seconds < 0.3
    assert time.process_time() > 0
