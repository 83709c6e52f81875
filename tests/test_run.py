"""`start`, settings, and the files of the book."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import readrun
from readrun import paths

SIZES: dict[str, Any] = {
    "smoke": dict(seeds=1, n=2),
    "cpu": dict(seeds=3, n=4),
    "gpu": dict(seeds=5, n=6, k="<b>"),
}


@pytest.fixture(autouse=True)
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("READRUN_ROOT", str(tmp_path))
    for name in ("READRUN_PROFILE", "READRUN_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"profile": "big"}, r"profile: 'big'; accepted: smoke, cpu, gpu"),
        ({"profile": 3}, r"profile: 3; accepted: a string"),
        ({"seed": -1}, r"seed: -1; accepted: a whole number, 0 or more"),
        ({"seed": 1.0}, r"seed: 1.0; accepted: a whole number"),
        ({"seed": "1"}, r"seed: '1'; accepted"),
        ({"seed": True}, r"seed: True; accepted"),
        ({"seeds": -2}, r"seeds: -2; accepted: a whole number, 0 or more"),
        ({"seeds": None}, r"seeds: None; accepted"),
        ({"device": "tpu"}, r"device: 'tpu'; accepted: auto, cpu, cuda"),
        ({"only": ["a"]}, r"only: \['a'\]; accepted: a string"),
        ({"checkpoint": None}, r"checkpoint: None; accepted: a string"),
        (
            {"checkpoint": "/no/such/folder"},
            r"checkpoint: '/no/such/folder' does not exist; accepted: a folder, a hub id",
        ),
        ({"checkpoint": "./mine"}, r"checkpoint: './mine' does not exist"),
        ({"checkpoint": "../mine"}, r"checkpoint"),
        ({"checkpoint": "~/no_such_model"}, r"checkpoint"),
        ({"checkpoint": "a/b/c"}, r"checkpoint"),
        ({"checkpoint": "there/mine"}, r"checkpoint: 'there/mine' does not exist"),
        ({"checkpoint": "mine\\model"}, r"checkpoint"),
        ({"template": object()}, r"template: object is neither JSON data .* accepted: JSON data"),
    ],
)
def test_bad_parameters_are_named_before_anything_is_made(
    book: Path, given: dict[str, Any], message: str
) -> None:
    (book / "there").mkdir()
    with pytest.raises(ValueError, match=message):
        readrun.start("toy", **given)
    assert not (book / "build").exists()


@pytest.mark.parametrize("slug", ["", "../x", "Toy", "a b", "a/b"])
def test_bad_slug(slug: str) -> None:
    with pytest.raises(ValueError, match="slug"):
        readrun.start(slug)


def test_cuda_asked_for_and_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ValueError, match=r"device: 'cuda' needs a CUDA GPU and there is none; accepted: device='cpu'"
    ):
        readrun.start("toy", device="cuda")
    with pytest.raises(ValueError, match=r"profile: 'gpu' .*accepted: device='cpu'.*only='none'"):
        readrun.start("toy", profile="gpu")
    assert readrun.start("toy", profile="gpu", only="none").device == "cpu"
    assert readrun.start("toy", profile="gpu", device="cpu").device == "cpu"
    monkeypatch.setenv("READRUN_DEVICE", "cpu")
    assert readrun.start("toy", profile="gpu").device == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("READRUN_DEVICE", "auto")
    assert readrun.start("toy").device == "cuda"
    assert readrun.start("toy", device="cpu").device == "cpu"


def test_profile_comes_from_parameter_environment_or_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert readrun.start("toy").profile == "cpu"
    monkeypatch.setenv("READRUN_PROFILE", "smoke")
    assert readrun.start("toy").profile == "smoke"
    assert readrun.start("toy", profile="cpu").profile == "cpu"
    monkeypatch.setenv("READRUN_PROFILE", "tiny")
    with pytest.raises(ValueError, match="profile: 'tiny'"):
        readrun.start("toy")


def test_checkpoint_is_a_hub_id_or_a_folder(book: Path) -> None:
    (book / "models/mine").mkdir(parents=True)
    for hub_id in ("org/name", "Qwen/Qwen2.5-1.5B", "gpt2", "", "openai:org/name@http://localhost:8000/v1"):
        assert readrun.start("toy", checkpoint=hub_id).checkpoint == hub_id
    assert readrun.start("toy", checkpoint="models/mine").checkpoint == str(book / "models/mine")


def test_folders(book: Path) -> None:
    run = readrun.start("toy", profile="smoke")
    assert run.folder == book / "build/toy/smoke/live"
    assert run.media == run.folder / "media" and run.media.is_dir()
    assert readrun.start("toy", out="elsewhere").folder == book / "elsewhere"


def test_parameters_are_kept(book: Path) -> None:
    run = readrun.start("toy", seed=np.int64(2), template="r1", ks=[1, 2])
    expected = {
        "profile": "cpu",
        "seed": 2,
        "seeds": 0,
        "device": "auto",
        "checkpoint": "",
        "only": "",
        "out": "",
    }
    assert run.parameters == expected | {"template": "r1", "ks": [1, 2]}
    assert json.dumps(run.parameters)


def test_seeds_are_the_profiles_or_the_callers() -> None:
    run = readrun.start("toy", seed=4)
    with pytest.raises(ValueError, match="seeds: 0 stands for the profile's own number"):
        _ = run.seeds
    S = run.settings(**SIZES)
    assert run.seeds == [4, 5, 6] and S.seeds == 3
    more = readrun.start("toy", seeds=2)
    assert more.seeds == [0, 1]
    assert more.settings(**SIZES).seeds == 2 and more.seeds == [0, 1]


def test_settings_are_the_active_profiles() -> None:
    S = readrun.start("toy", profile="gpu", device="cpu").settings(**SIZES)
    assert (S.n, S.k) == (6, "<b>")
    assert vars(S) == {"n": 6, "k": "<b>"}, "seeds must not enter unit keys through vars(S)"
    assert vars(readrun.start("toy", seeds=9).settings(**SIZES)) == {"n": 4}


def test_settings_table_shows_all_profiles_and_marks_one() -> None:
    table = readrun.start("toy", profile="smoke").settings(**SIZES)._repr_html_()
    assert table.count("<tr>") == 4 and table.count("<td>") == 9
    assert '<th scope="row">n</th><td><strong>2</strong></td><td>4</td><td>6</td>' in table
    assert "&lt;b&gt;" in table and "<b>" not in table


@pytest.mark.parametrize(
    ("bad", "error"),
    [({"n": 1}, "seeds of cpu"), ({"seeds": 0}, "seeds of cpu: 0"), ({"seeds": 1, "f": print}, "cpu")],
)
def test_bad_settings(bad: dict[str, Any], error: str) -> None:
    with pytest.raises((ValueError, TypeError), match=error):
        readrun.start("toy", profile="smoke").settings(**(SIZES | {"cpu": bad}))


def test_start_seeds_the_streams() -> None:
    torch = pytest.importorskip("torch")

    def draw(seed: int) -> tuple[float, float, float]:
        readrun.start("toy", seed=seed)
        return random.random(), np.random.random(), torch.rand(1).item()

    first = draw(1)
    assert draw(2) != first and draw(1) == first
    assert torch.are_deterministic_algorithms_enabled()


def test_no_cudnn_attention_on_a_gpu(tmp_path: Path) -> None:
    """Its gradients can be nan (pytorch/pytorch#196678); a unit must not depend on what ran before it."""
    torch = pytest.importorskip("torch")
    on = torch.backends.cuda.cudnn_sdp_enabled()
    run = readrun.start("own", profile="smoke", device="cpu", out=str(tmp_path))
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        run.torch_setup()
        assert torch.backends.cuda.cudnn_sdp_enabled()
        run.device = "cuda"
        run.torch_setup()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(on)


def test_jax_of_a_library_stays_off_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bm25s starts JAX when it is imported: here a stand-in that says on which platforms it would start."""
    pytest.importorskip("bm25s")
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax/__init__.py").touch()
    lax = "import os\ndef top_k(scores, k):\n    print(os.environ.get('JAX_PLATFORMS', 'all'))\n"
    (tmp_path / "jax/lax.py").write_text(lax)
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import readrun; {{}}; import bm25s"
    start = "readrun.start('toy', device='cpu')"
    for before, given, seen in (("0", {}, "all"), (start, {}, "cpu"), (start, {"JAX_PLATFORMS": "x"}, "x")):
        monkeypatch.delenv("JAX_PLATFORMS", raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        assert (
            subprocess.check_output([sys.executable, "-c", program.format(before)], text=True) == f"{seen}\n"
        )


def test_start_needs_no_torch() -> None:
    program = "import sys, readrun; readrun.start('toy', device='cpu'); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"


def test_render_seconds_leave_units_out(monkeypatch: pytest.MonkeyPatch) -> None:
    run = readrun.start("toy")
    run._computing = 100.0
    assert run.render_seconds < -50


# ---------------------------------------------------------------- files of the book


def test_checkout_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("READRUN_ROOT")
    assert paths.root() == Path(__file__).parents[1]
    assert paths.results("toy", "npz") == paths.root() / "data/results/toy.gpu.npz"


def test_write_atomic_leaves_the_old_file_when_it_fails(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = book / "new/a.json"
    paths.write_atomic(file, "old")
    with pytest.raises(TypeError):
        paths.write_atomic(file, 3)  # type: ignore[arg-type]
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        paths.write_atomic(file, "new")
    assert file.read_text() == "old" and [p.name for p in file.parent.iterdir()] == ["a.json"]


@pytest.fixture
def assets(book: Path) -> Path:
    top = book / "data/assets/toy"
    (top / "base").mkdir(parents=True)
    (top / "base/config.json").write_text("{}")
    (top / "words.txt").write_text("a b")
    paths.write_manifest("toy", source="here", licence="CC0", how="by hand")
    return top


def test_asset_is_verified(assets: Path) -> None:
    assert readrun.asset("toy/words.txt") == assets / "words.txt"
    assert readrun.asset("toy/base") == assets / "base"
    listed = json.loads((assets / "MANIFEST.json").read_text())
    assert listed["base/config.json"].keys() == {"sha256", "source", "licence", "how"}
    (assets / "base/config.json").write_text("[]")
    for name in ("toy/base", "toy/base/config.json", "toy"):
        with pytest.raises(ValueError, match="toy/base/config.json differs from its checksum"):
            readrun.asset(name)
    assert readrun.asset("toy/words.txt").read_text() == "a b"


@pytest.mark.parametrize(
    "name", ["toy/none.txt", "other", "", "toy/../toy/words.txt", "/toy/none", "toy/words.txt/x"]
)
def test_missing_asset(assets: Path, name: str) -> None:
    with pytest.raises(ValueError, match="there is no such file or folder"):
        readrun.asset(name)


def test_unlisted_asset_and_broken_manifest(assets: Path) -> None:
    (assets / "new.txt").write_text("x")
    with pytest.raises(ValueError, match="toy/new.txt is not listed"):
        readrun.asset("toy/new.txt")
    (assets / "MANIFEST.json").write_text("{")
    with pytest.raises(ValueError, match="MANIFEST.json is not readable"):
        readrun.asset("toy/words.txt")


def test_write_manifest_keeps_what_is_said_about_old_files(assets: Path) -> None:
    (assets / "words.txt").write_text("c")
    (assets / "new.txt").write_text("x")
    (assets / "base/config.json").unlink()
    listed = json.loads(paths.write_manifest("toy", "there", "MIT", "script").read_text())
    assert {k: v["licence"] for k, v in listed.items()} == {"words.txt": "CC0", "new.txt": "MIT"}
    assert readrun.asset("toy") == assets
