"""Units: their keys, their files, what interrupts them."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import readrun
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from readrun import paths, units

NOTEBOOK = '''# %% [markdown]
# # Toy

# %% tags=["parameters"]
profile = ""
seed = 0
seeds = 0
device = "auto"
checkpoint = ""
only = ""
out = ""
template = "r1"

# %%
# %matplotlib inline
import random
import numpy as np
import readrun
from readrun import rl
run = readrun.start("toy", profile=profile, seed=seed, seeds=seeds, device=device, checkpoint=checkpoint,
                    only=only, out=out, template=template)
S = run.settings(smoke=dict(seeds=1, n=2), cpu=dict(seeds=2, n=3), gpu=dict(seeds=3, n=4))

# %%
TABLE = {"a": 1}
OTHER = [1]

# %%
TABLE["b"] = 2

class Model:
    size = 3

    def forward(self, x):
        return x * TABLE["b"]

def helper(x, scale=1.0):
    """Some words."""
    return Model().forward(x) * scale  # a comment

# %%
# a worked example
x = 3
arm = "unrelated"
print(helper(x), OTHER.append(2))

# %% tags=["figure"]
TABLE["c"] = 3
print("figure")

# %%
def base(n):
    return {"start": float(n), "values": np.arange(n)}

def train(arm, seed, settings, base):
    noise = [np.random.normal() for x in range(settings["n"])]
    return {"last": helper(noise[-1]), "device": run.device, "from": base["start"], "text": template}

# %%
first = run.unit(base, n=S.n)
plan = [(arm, s) for s in run.seeds for arm in ("a", "b")]
found = [run.unit(train, arm=a, seed=s, settings=vars(S), base=first) for a, s in plan]

# %%
TABLE["later"] = 4
def base(n):
    return {"redefined": 1}
'''


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("READRUN_ROOT", str(tmp_path))
    for name in ("READRUN_PROFILE", "READRUN_COMMIT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("READRUN_DEVICE", "cpu")
    (tmp_path / "notebooks").mkdir()
    return tmp_path


def execute(book: Path, text: str = NOTEBOOK, **parameters: Any) -> dict[str, Any]:
    """Run the notebook as a script; returns its globals."""
    for name, value in parameters.items():
        default = "0" if isinstance(value, int) else '""'
        assert f"\n{name} = {default}\n" in text
        text = text.replace(f"\n{name} = {default}\n", f"\n{name} = {value!r}\n")
    script = book / "notebooks/toy.py"
    script.write_text(text)
    space: dict[str, Any] = {"__name__": "toy"}
    exec(compile(text, str(script), "exec"), space)
    return space


def keys(book: Path, text: str = NOTEBOOK, **parameters: Any) -> list[str]:
    space = execute(book, text, **parameters)
    return [space["first"].key, *(unit.key for unit in space["found"])]


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# # Toy", "# # Toys, more of them"),
        ("# a comment", "# another comment"),
        ('"""Some words."""', '"""Other words."""'),
        ("return x * TABLE", "return  x  *  TABLE"),
        ("# %%\ndef base(n)", "# %%\nprint('new cell')\n\n# %%\ndef base(n)"),
        ("x = 3\n", "x = 4\nnoise = 5\n"),
        ("print(helper(x), OTHER.append(2))", "print(helper(x + 1), OTHER)"),
        ('TABLE["c"] = 3', 'TABLE["c"] = 33'),
        ('TABLE["later"] = 4', 'TABLE["later"] = 5'),
        ('{"redefined": 1}', '{"redefined": 2}'),
        ("OTHER = [1]", "OTHER = [2]"),
        ("smoke=dict(seeds=1, n=2)", "smoke=dict(seeds=1, n=7)"),
        ("import random\nimport numpy as np", "import math, random, numpy as np"),
        ("from readrun import rl", "from readrun import rl, train"),
    ],
)
def test_key_stays(book: Path, old: str, new: str) -> None:
    assert NOTEBOOK.count(old) == 1
    assert keys(book, NOTEBOOK.replace(old, new)) == keys(book)


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("x * TABLE", "x + TABLE", {"train"}),
        ('TABLE["b"] = 2', 'TABLE["b"] = 3', {"train"}),
        ('TABLE = {"a": 1}', 'TABLE = {"a": 2}', {"train"}),
        ("size = 3", "size = 4", {"train"}),
        ("scale=1.0", "scale=2.0", {"train"}),
        ("noise[-1]", "noise[0]", {"train"}),
        ("float(n)", "float(n + 1)", {"base", "train"}),
        ("np.arange(n)", "np.zeros(n)", {"base", "train"}),
        ("import numpy as np", "import numpy as np\nnp.random.extra = 1", {"base", "train"}),
        ("cpu=dict(seeds=2, n=3)", "cpu=dict(seeds=2, n=5)", {"base", "train"}),
        ('template = "r1"', 'template = "none"', {"train"}),
        ("# a worked example", "helper.scale = 3", {"train"}),
        ("# a worked example", "TABLE.update(z=1)", {"train"}),
        ("# a worked example", "for k in 'xyz':\n    TABLE[k] = 1", {"train"}),
        ("# a worked example", "random.shuffle(TABLE)", {"train"}),
        ("# a worked example", "np.set_something = 1", {"base", "train"}),
        ("# a worked example", "def helper(x): return x", {"train"}),
    ],
)
def test_key_changes_for_what_is_reached(book: Path, old: str, new: str, changed: set[str]) -> None:
    assert NOTEBOOK.count(old) == 1
    before = keys(book)
    text = NOTEBOOK.replace(old, new)
    text = text.replace("return x * TABLE", "return x * 1 or TABLE") if "shuffle" in new else text
    text = text.replace("random.shuffle(TABLE)", "if TABLE is None:\n    random.shuffle(TABLE)")
    after = keys(book, text)
    assert {"base"} & changed == ({"base"} if before[0] != after[0] else set())
    assert all((a != b) == ("train" in changed) for a, b in zip(before[1:], after[1:], strict=True))


def test_key_follows_arguments_units_and_profile(book: Path) -> None:
    cpu, smoke = keys(book), keys(book, profile="smoke")
    assert len(set(cpu)) == len(cpu) == 5
    assert not set(cpu) & set(smoke)
    assert keys(book, seeds=1) == cpu[:3], "how many seeds there are does not matter"
    assert keys(book, seed=1, seeds=1) == [cpu[0], *cpu[3:]], "nor which is first"


def test_only_out_and_device_are_in_no_key(book: Path) -> None:
    text = NOTEBOOK.replace(
        '"device": run.device', '"device": str(run.device) + str(run.folder) + str(run.seeds)'
    )
    expected = keys(book, text)
    assert keys(book, text, out=str(book / "elsewhere"), only="*") == expected
    assert keys(book, text.replace('device = "auto"', 'device = "cpu"')) == expected


@pytest.mark.parametrize(
    "use", ["run.profile", "run.checkpoint", "run.parameters", "vars(run)", "checkpoint", "seeds"]
)
def test_parameters_count_where_they_are_read(book: Path, use: str) -> None:
    text = NOTEBOOK.replace('"text": template', f'"text": str({use})')
    plain = keys(book, text)[1]
    assert keys(book, text, checkpoint="org/name")[1] != plain or use in ("run.profile", "seeds")
    assert keys(book, text.replace('template = "r1"', 'template = "x"'))[1] == plain or use in (
        "run.parameters",
        "vars(run)",
    )
    if use == "seeds":
        assert keys(book, text, seeds=1)[1] != plain


def test_key_follows_readrun_modules_and_assets(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = NOTEBOOK.replace(
        'return {"start"', "rl.f(readrun.asset('toy/a/x.txt'))\n    return {\"start\""
    ).replace("from readrun import rl", "from readrun import paths as P\nclass rl:\n    f = print")
    (book / "data/assets/toy/a").mkdir(parents=True)
    (book / "data/assets/toy/a/x.txt").write_text("1")
    (book / "data/assets/toy/b.txt").write_text("1")
    paths.write_manifest("toy", "s", "l", "h")
    first = keys(book, text)
    (book / "data/assets/toy/b.txt").write_text("2")
    assert keys(book, text) == first, "an asset that the unit does not name"
    (book / "data/assets/toy/a/x.txt").write_text("2")
    paths.write_manifest("toy", "s", "l", "h")
    assert keys(book, text)[0] != first[0]
    computed = text.replace("'toy/a/x.txt'", "'toy/' + 'a/x.txt'")
    second = keys(book, computed)
    (book / "data/assets/toy/b.txt").write_text("3")
    third = keys(book, computed)
    assert third[0] != second[0], "a computed name: all assets of the chapter count"
    (book / "data/assets/shared").mkdir()
    (book / "data/assets/shared/words.txt").write_text("4")
    assert keys(book, computed)[0] != third[0], "and the shared ones"
    whole = text.replace("'toy/a/x.txt'", "'shared'")
    paths.write_manifest("shared", "s", "l", "h")
    fourth = keys(book, whole)
    (book / "data/assets/shared/words.txt").write_text("5")
    paths.write_manifest("shared", "s", "l", "h")
    assert keys(book, whole)[0] != fourth[0], "a whole folder"


def test_key_follows_readrun_modules(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = book / "library"
    library.mkdir()
    for name in ("rl", "train", "deep"):
        (library / f"{name}.py").write_text("from readrun import deep\n" if name == "rl" else "X = 1\n")
    text = NOTEBOOK.replace('return {"start"', 'return {"rl": rl.__name__, "start"')
    monkeypatch.setattr(paths, "library", lambda: library)
    units.content.modules_in.cache_clear()
    first = keys(book, text)
    (library / "train.py").write_text("X = 2\n")
    assert keys(book, text) == first
    (library / "deep.py").write_text("X = 2\n")
    assert keys(book, text)[0] != first[0]
    units.content.modules_in.cache_clear()


@pytest.mark.parametrize(
    "doubt",
    [
        "eval('1')",
        "globals()['TABLE']",
        "exec('')",
        "__import__('math')",
        "unknown_name if n < 0 else 0",
        "changed()",
    ],
)
def test_in_doubt_everything_counts(book: Path, doubt: str) -> None:
    text = NOTEBOOK.replace('return {"start"', f'{doubt}\n    return {{"start"')
    text = text.replace(
        "import random\n", "import random\nfrom math import *\ndef changed():\n    global arm\n    arm = 1\n"
    )
    plain, first = keys(book, text), keys(book, text.replace("x = 3\n", "x = 4\n"))
    assert first[0] != plain[0], "an unrelated cell counts now"
    commented = text.replace("# a comment", "# more").replace('print("figure")', 'print("other")')
    assert keys(book, commented) == plain, "comments and figures still do not"
    assert keys(book, text.replace("seeds = 0", "seeds = 1"))[0] == plain[0], "nor do run parameters"


@pytest.mark.parametrize("bad", [lambda n: {}, print, "train", Path])
def test_unit_wants_a_named_function(book: Path, bad: Any) -> None:
    run = execute(book)["run"]
    with pytest.raises(TypeError, match="not a function with a name"):
        run.unit(bad, n=1)


def closure(factor: int) -> Any:
    def scaled(n: int) -> dict[str, Any]:
        return {"value": n * factor}

    return scaled


def default(factor: int) -> Any:
    def scaled(n: int, factor: int = factor) -> dict[str, Any]:
        return {"value": n * factor}

    return scaled


def test_what_no_source_shows_is_refused_or_counts(book: Path) -> None:
    """Two functions of one source, another function under the same name: never the same key."""
    run = execute(book)["run"]
    with pytest.raises(TypeError, match="scaled must be defined at the top level"):
        run.unit(closure(2), n=1)
    assert [run.unit(default(f), n=1)["value"] for f in (2, 3)] == [2, 3]
    wrapped = functools.wraps(work)(lambda **arguments: {"other": 1})
    with pytest.raises(TypeError, match="work must .* be what work stands for there"):
        run.unit(wrapped, name="a")


@pytest.mark.parametrize("use", ["run.seeds", "S.seeds", "len((lambda r: r.seeds)(run))"])
def test_a_unit_that_reads_the_seeds_of_the_run_depends_on_them(book: Path, use: str) -> None:
    text = NOTEBOOK.replace('"text": template', f'"text": str({use})')
    assert keys(book, text, seeds=1)[1] != keys(book, text)[1]


def test_parameters_of_a_model_are_not_those_of_the_run(book: Path) -> None:
    text = NOTEBOOK.replace('"text": template', '"text": str(getattr(Model, "x", Model).parameters)')
    text = text.replace("    size = 3\n", "    size = 3\n    parameters = ()\n")
    assert keys(book, text, seeds=1)[1] == keys(book, text)[1]


@pytest.mark.parametrize("bad", [object(), {1: 2}, np.zeros(2), {"a": [{2}]}, b"x"])
def test_unit_wants_plain_arguments(book: Path, bad: Any) -> None:
    space = execute(book)
    with pytest.raises(
        TypeError, match=r"base: argument\['n'\].* is neither JSON data with string keys nor a unit"
    ):
        space["run"].unit(space["base"], n=bad)


def test_equal_arguments_have_equal_keys(book: Path) -> None:
    space = execute(book)
    run, base = space["run"], units
    key = lambda **arguments: base.unit_key(space["train"], arguments, run)  # noqa: E731
    assert key(a=(1, 2.0)) == key(a=[1, 2.0]) == key(a=[np.int64(1), np.float64(2)])
    assert key(a=1, b=2) == key(b=2, a=1)
    assert key(a=float("nan")) == key(a=float("nan"))
    assert len({key(a=v) for v in (1, 1.0, True, "1", None, [1], {"1": 1}, space["first"])}) == 8


# ---------------------------------------------------------------- the same keys everywhere


def folders(book: Path) -> set[str]:
    found = {p.name for p in (book / "build/toy/smoke/units").iterdir() if not p.name.startswith(".")}
    subprocess.run(["rm", "-rf", str(book / "build")], check=True)
    return found


def test_script_kernel_papermill_and_nbval_agree(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jupytext, papermill = pytest.importorskip("jupytext"), pytest.importorskip("papermill")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("READRUN_PROFILE", "smoke")
    monkeypatch.setenv("IPYTHONDIR", str(book / "ipython"))
    execute(book)
    script = folders(book)
    assert len(script) == 3
    notebook = jupytext.read(book / "notebooks/toy.py")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, book / "toy.ipynb")

    papermill.execute_notebook(
        book / "toy.ipynb",
        book / "out.ipynb",
        {"profile": "smoke", "template": "r1", "seeds": 1},
        progress_bar=False,
    )
    injected = [
        c
        for c in nbformat.read(book / "out.ipynb", 4).cells
        if "injected-parameters" in c.metadata.get("tags", [])
    ]
    assert injected and folders(book) == script

    call = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval-lax", "toy.ipynb"]
    done = subprocess.run(call, cwd=book, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert folders(book) == script

    # JupyterLab: a definition is tried out, put back, cells are run again, one is never saved to the script
    cells = [c for c in notebook.cells if c.cell_type == "code"]
    edited = nbformat.from_dict(
        dict(cells[3]) | {"source": cells[3].source.replace("x * TABLE", "x - TABLE")}
    )
    extra = nbformat.v4.new_code_cell("%time y = 5\nfor k in 'ab': y += 1\n!true")
    notebook.cells = [*cells[:3], edited, *cells[2:5], extra, cells[5], *cells[4:8]]
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(book)}}).execute()
    assert folders(book) == script
    notebook.cells = [*cells[:3], cells[3], edited, *cells[4:8]]
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(book)}}).execute()
    assert len(folders(book) & script) == 1, "an edit that was run counts, whether it is saved or not"


def test_worker_module_and_chapter_agree_with_the_script(book: Path) -> None:
    text = NOTEBOOK.replace('def base(n):\n    return {"redefined": 1}\n', "").replace(
        'TABLE["later"] = 4', "pass"
    )
    expected = execute(book, text)["first"].key
    q = readrun.chapter("toy")
    run = readrun.start("toy", profile="cpu", template="r1")
    assert run.unit(q.base, n=3).key == expected
    sys.modules.pop("readrun.chapters.toy")


# ---------------------------------------------------------------- values

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=8,
)
ARRAYS = hnp.arrays(
    st.sampled_from(["f4", "f8", "i8", "u1", "?", "c16", "<U3", "M8[s]"]),
    hnp.array_shapes(min_dims=0, min_side=0),
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=JSON, array=ARRAYS)
def test_json_and_arrays_round_trip_exactly(tmp_path: Path, value: Any, array: np.ndarray) -> None:
    folder = Path(os.path.join(tmp_path, os.urandom(4).hex()))
    folder.mkdir()
    kinds = units.write_values(folder, {"value": value, "array": array})
    assert kinds == {"value": "json", "array": "array"}
    assert repr(units.read_value(folder, "value", "json")) == repr(value)
    back = units.read_value(folder, "array", "array")
    assert back.dtype == array.dtype and back.shape == array.shape and back.tobytes() == array.tobytes()


def test_scalars_of_numpy_become_plain(tmp_path: Path) -> None:
    units.write_values(
        tmp_path, {"a": np.float32(0.1), "b": (np.int8(3), np.bool_(True)), "nan": np.float64("nan")}
    )
    assert units.read_value(tmp_path, "a", "json") == float(np.float32(0.1))
    assert units.read_value(tmp_path, "b", "json") == [3, True]
    assert units.read_value(tmp_path, "nan", "json") != units.read_value(tmp_path, "nan", "json")


def test_tensors_and_state_dicts_round_trip(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tied = torch.randn(3, 2, requires_grad=True)
    state = {"z": tied, "a": tied.detach(), "half": tied.detach().to(torch.bfloat16).T, "n": torch.tensor(3)}
    kinds = units.write_values(tmp_path, {"state": state, "one": torch.arange(3), "none": {}})
    assert kinds == {"state": "state", "one": "tensor", "none": "json"}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "one.safetensors",
        "result.json",
        "state.safetensors",
    ]
    back = units.read_value(tmp_path, "state", "state")
    assert list(back) == list(state), "in the order of the model"
    assert all(torch.equal(back[k], state[k]) and back[k].dtype == state[k].dtype for k in state)
    assert torch.equal(units.read_value(tmp_path, "one", "tensor"), torch.arange(3))


@pytest.mark.parametrize(
    "bad", [{"a": object()}, {"a": {1: 2}}, {"a": np.array([object()])}, {"a": [np.zeros(2)]}]
)
def test_other_values_are_refused(tmp_path: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="result"):
        units.write_values(tmp_path, bad)


# ---------------------------------------------------------------- computing and taking

calls: list[str] = []


def work(name: str, seed: int = 0, base: Any = None, fail: bool = False) -> dict[str, Any]:
    calls.append(name)
    if fail:
        raise ZeroDivisionError("in the work")
    inner = sum(u["value"] for u in units.units_in(base))
    return {
        "value": 1 + inner,
        "pair": (1, 2),
        "noise": [random.random(), float(np.random.random())],
        "curve": np.ones(2),
    }


def other(name: str, seed: int = 0) -> dict[str, Any]:
    return {"noise": [random.random(), float(np.random.random())]}


def unseeded(name: str) -> dict[str, Any]:
    return {"noise": [random.random(), float(np.random.random())]}


@pytest.fixture
def start(book: Path) -> Any:
    calls.clear()
    return lambda **parameters: readrun.start("toy", **parameters)


def test_a_unit_is_computed_once_and_read_as_it_was_saved(start: Any) -> None:
    run = start()
    unit = run.unit(work, name="a", seed=1)
    assert (
        unit.done
        and unit["value"] == 1
        and unit["pair"] == [1, 2]
        and list(unit) == ["value", "pair", "noise", "curve"]
    )
    assert len(unit) == 4 and "curve" in unit and unit.get("no") is None
    assert run.unit(work, name="a", seed=1) is unit and run.units == [unit]
    again = start().unit(work, name="a", seed=1)
    assert calls == ["a"] and again == unit and again["noise"] == unit["noise"] and hash(again) == hash(unit)
    assert unit.id == "work/name=a,seed=1" and unit.arguments == {"name": "a", "seed": 1}


def test_id_has_short_scalars_only(start: Any) -> None:
    unit = start().unit(work, name="two words", seed=1, base=["x", {"y": 1}])
    assert unit.id == "work/name=two_words,seed=1"


def test_meta(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("READRUN_COMMIT", "abc")
    units.commit.cache_clear()
    unit = start().unit(work, name="a", base={"x": 1.5})
    units.commit.cache_clear()
    meta = unit.meta
    assert meta["id"] == unit.id and meta["key"] == unit.key and meta["commit"] == "abc"
    assert meta["arguments"] == {"name": "a", "base": {"x": 1.5}}
    assert meta["versions"].keys() >= {"python", "numpy"} and meta["device"]
    assert meta["seconds"] >= 0 and 0 < meta["peak_ram_gib"] < 64 and meta["peak_gpu_gib"] is None
    assert meta["recorded"].endswith("+00:00")
    assert json.loads((unit.folder / "meta.json").read_text()) == meta


def test_peak_memory_is_the_units_own(start: Any) -> None:
    meta: dict[str, Any] = {}
    small: dict[str, Any] = {}
    with units.measured(meta, "cpu"):
        block = np.ones(40 * 2**20)  # 320 MiB
        del block
    with units.measured(small, "cpu"):
        time.sleep(0.01)
    assert meta["peak_ram_gib"] - small["peak_ram_gib"] > 0.25 or not Path("/proc/self/clear_refs").exists()
    assert small["seconds"] >= 0.01


def test_only_selects_and_what_it_needs_is_computed(start: Any) -> None:
    def ask(run: Any) -> tuple[Any, Any, Any]:
        base = run.unit(work, name="base")
        spare = run.unit(work, name="spare")
        return base, spare, run.unit(work, name="top", base=[{"deep": base}])

    base, spare, top = ask(start(only="none"))
    assert [u.done for u in (base, spare, top)] == [False] * 3 and calls == []
    with pytest.raises(
        KeyError, match="unit work/name=top has no result: `only` did not select it and none is saved"
    ):
        top["value"]
    with pytest.raises(KeyError, match="has no result"):
        list(top)
    base, spare, top = ask(start(only="nothing */name=t?p"))
    assert [u.done for u in (base, spare, top)] == [True, False, True] and calls == ["base", "top"]
    assert top["value"] == 2
    assert [u.done for u in ask(start(only="none"))] == [True, False, True] and calls == ["base", "top"]
    assert all(u.done for u in ask(start(only="work"))) and calls == ["base", "top", "spare"]


def test_a_unit_that_fails_says_which_and_leaves_nothing(start: Any, book: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        start().unit(work, name="a", fail=True)
    assert caught.value.__notes__ == ["in unit work/name=a,fail=True"]
    assert not list((book / "build/toy/cpu").glob("units/*"))


def wrong_result(kind: str) -> Any:
    return {"list": [1], "keys": {"a b": 1}, "numbers": {1: 1}, "value": {"a": object()}}[kind]


@pytest.mark.parametrize("kind", ["list", "keys", "numbers", "value"])
def test_a_wrong_result_is_refused(start: Any, book: Path, kind: str) -> None:
    with pytest.raises(TypeError, match="must return a dict whose keys are identifiers|neither JSON"):
        start().unit(wrong_result, kind=kind)
    assert not list((book / "build/toy/cpu/units").glob("*.*")) and not list(
        (book / "build/toy/cpu").glob("units/*")
    )


def test_streams_depend_on_function_and_seed_alone(start: Any) -> None:
    one = {n: start().unit(work, name=n, seed=1)["noise"] for n in "ab"}
    assert one["a"] == one["b"], "arms share the stream of their seed"
    assert start().unit(work, name="a", seed=2)["noise"] != one["a"]
    assert start().unit(other, name="a", seed=1)["noise"] != one["a"]
    assert start().unit(unseeded, name="a")["noise"] != start().unit(unseeded, name="b")["noise"]


def test_streams_do_not_depend_on_what_ran_before_and_come_back(start: Any, book: Path) -> None:
    torch = pytest.importorskip("torch")

    def after(run: Any) -> list[float]:
        unit = run.unit(work, name="a", seed=1)
        return [*unit["noise"], random.random(), float(np.random.random()), float(torch.rand(()))]

    fresh = after(start())
    assert after(start()) == fresh, "computed or taken, the notebook's own streams go on alike"
    subprocess.run(["rm", "-rf", str(book / "build")], check=True)
    run = start(seed=0)
    random.random(), np.random.random(), torch.rand(3)
    assert after(run)[:2] == fresh[:2]


def torch_noise(name: str) -> dict[str, Any]:
    import torch

    calls.append("torch")
    return {"noise": torch.rand(2), "deterministic": torch.are_deterministic_algorithms_enabled()}


def test_torch_imported_inside_the_unit_is_seeded_too(book: Path) -> None:
    pytest.importorskip("torch")
    module = book / "late.py"
    module.write_text(
        "import sys, readrun\n"
        "def torch_noise(name):\n    import torch\n"
        "    return {'noise': torch.rand(2).tolist(), 'det': torch.are_deterministic_algorithms_enabled()}\n"
        "if len(sys.argv) > 1: import torch\n"
        "unit = readrun.start('toy').unit(torch_noise, name='a')\n"
        "print(unit['noise'], unit['det'], unit.key)\n"
    )
    lines = []
    for arguments in ([], ["early"]):
        lines.append(subprocess.check_output([sys.executable, str(module), *arguments], text=True))
        subprocess.run(["rm", "-rf", str(book / "build")], check=True)
    assert lines[0] == lines[1] and "True" in lines[0]


# ---------------------------------------------------------------- stores


def test_a_folder_elsewhere_gets_every_unit(start: Any, book: Path) -> None:
    old = start().unit(work, name="a")
    run = start(out=str(book / "host"))
    assert [run.unit(work, name=n).done for n in "ab"] == [True, True] and calls == ["a", "b"]
    assert {p.name for p in (book / "host/units").iterdir()} == {
        u.name for u in run.units
    } and old.name in run.units[0].name
    assert {p.name for p in (book / "build/toy/cpu/units").iterdir()} == {u.name for u in run.units}
    inside = start(out=str(book / "build/toy/cpu/0123"))
    inside.unit(work, name="c")
    assert not (inside.folder / "units").exists(), "a run folder of the machine shares the chapter's units"
    assert (inside.folder / "units.log").read_text().split()[1] == "work/name=c"


def damage(folder: Path, how: str) -> None:
    if how == "cut":
        (folder / "arrays.npz").write_bytes((folder / "arrays.npz").read_bytes()[:-7])
    elif how == "flip":
        (folder / "result.json").write_text((folder / "result.json").read_text().replace("1", "2"))
    elif how == "missing":
        (folder / "result.json").unlink()
    elif how == "empty":
        (folder / "meta.json").write_text("")
    elif how == "list":
        (folder / "meta.json").write_text("[]")
    elif how == "key":
        (folder / "meta.json").write_text((folder / "meta.json").read_text().replace('"key": "', '"key": "0'))
    else:
        (folder / "meta.json").unlink()


@pytest.mark.parametrize("how", ["cut", "flip", "missing", "empty", "list", "key", "no meta"])
def test_a_damaged_unit_is_kept_aside_and_computed_again(start: Any, how: str) -> None:
    unit = start().unit(work, name="a")
    damage(unit.folder, how)
    with pytest.warns(RuntimeWarning, match=r"damaged .*kept aside"):
        assert not start(only="none").unit(work, name="a").done
    again = start().unit(work, name="a")
    assert again["noise"] == unit["noise"] and calls == ["a", "a"]
    names = sorted(p.name for p in again.folder.parent.iterdir())
    assert len(names) == 2 and names[0].startswith(f".damaged-{unit.name}") and names[1] == unit.name


def test_a_full_disk_is_said_and_leaves_no_half_unit(book: Path) -> None:
    program = (
        "import numpy as np, readrun, resource, signal\n"
        "def big(n):\n    return {'a': np.random.random(n)}\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "run = readrun.start('toy')\n"
        "print(run.unit(big, n=10).done)\n"
        "try:\n    run.unit(big, n=10000)\n"
        "except OSError as error:\n    print(error.errno, error)\n"
    )
    (book / "p.py").write_text(program)
    out = subprocess.check_output([sys.executable, str(book / "p.py")], text=True, cwd=book).splitlines()
    assert out[0] == "True" and "unit big-" in out[1] and "could not be saved in" in out[1]
    assert out[1].endswith("File too large; nothing half-written is left") and out[1].startswith("27 ")
    assert len(list((book / "build/toy/cpu/units").iterdir())) == 1
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


def _race(barrier: Any, book: str, queue: Any) -> None:
    os.environ["READRUN_ROOT"] = book
    run = readrun.start("toy", device="cpu")
    barrier.wait()
    try:
        queue.put([run.unit(work, name=str(n))["noise"] for n in range(60)])
    except BaseException as error:
        queue.put(repr(error))


def test_concurrent_writers_agree(book: Path) -> None:
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    barrier, queue = context.Barrier(4), context.Queue()
    workers = [context.Process(target=_race, args=(barrier, str(book), queue)) for _ in range(4)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert all(r == results[0] for r in results), [r for r in results if isinstance(r, str)]
    assert len(results[0]) == 60, results[0]
    assert len(list((book / "build/toy/cpu/units").iterdir())) == 60, "no temporary folder, nothing put aside"


def test_a_killed_run_resumes(book: Path) -> None:
    (book / "p.py").write_text(
        "import time, os, numpy as np, readrun\n"
        "def step(n):\n"
        "    with open('calls.txt', 'a') as f: f.write(f'{n}\\n')\n"
        "    time.sleep(0.02)\n    return {'a': np.random.random(50000), 'n': n}\n"
        "run = readrun.start('toy')\n"
        "print(sum(run.unit(step, n=n)['a'].sum() for n in range(40)))\n"
    )
    call = [sys.executable, "p.py"]
    for wait in (0.0, 0.11, 0.23, 0.17):
        process = subprocess.Popen(call, cwd=book, stdout=subprocess.PIPE)
        deadline, before = time.time() + 30, len((book / "calls.txt").read_text()) if wait else 0
        while time.time() < deadline:  # until it works again, then a moment more
            if (book / "calls.txt").exists() and len((book / "calls.txt").read_text()) > before:
                break
            time.sleep(0.005)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    total = subprocess.check_output(call, cwd=book, text=True)
    done = [int(n) for n in (book / "calls.txt").read_text().split()]
    assert set(done) == set(range(40)) and len(done) <= 44, (
        "at most the unit that was interrupted is repeated"
    )
    assert subprocess.check_output(call, cwd=book, text=True) == total
    assert len((book / "calls.txt").read_text().split()) == len(done)


def test_key_of_a_unit_is_fast(book: Path) -> None:
    filler = "".join(
        f"\n# %%\ndef g{i}(x):\n    return [x * k for k in range({i})] + [helper(x)]\n" for i in range(300)
    )
    space = execute(book, NOTEBOOK.replace("# %%\ndef base(n)", f"{filler}\n# %%\ndef base(n)", 1))
    began = time.process_time()
    for n in range(100):
        units.unit_key(space["train"], {"n": n}, space["run"])
    assert time.process_time() - began < 2.0
