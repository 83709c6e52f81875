"""Chapter scholar_copilot: oracles for its definitions, its bad inputs, its path for one's own checkpoint."""

from __future__ import annotations

import functools
import inspect
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import readrun
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from readrun import chapter, docstrings
from tokenizers import Tokenizer
from transformers import BertConfig, BertLMHeadModel, BertModel, DynamicCache, PreTrainedTokenizerFast

q = chapter("scholar_copilot")
SIZE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
WORDS = ["we", " use", " the", " method", " of", " and", " then", " solve", " it", " with", " down", " up"]


@functools.cache
def tokenizer():
    return q.train_tokenizer(["we use the method of and then solve it with down up"] * 3, 300)


def doc(name: str, text: str = "") -> q.Doc:
    return q.Doc(name, name.upper(), text or f"the {name}", f"@misc{{{name},\n  note = {{x}}\n}}")


def corpus(*papers, names: str = "abcd") -> q.Corpus:
    made = [q.Paper(f"p{i}", "toy", f"toy/{i}", tuple(segments)) for i, segments in enumerate(papers)]
    return q.Corpus({n: doc(n) for n in names}, made or [q.Paper("p", "toy", "toy/p", ("we use",))], [])


def cite(name: str) -> q.Citation:
    return q.Citation(name, f"[{name}]")


@functools.cache
def tiny(kind: str = "qwen2", dtype: torch.dtype = torch.float32):
    """A random model of one of two families; BERT runs as a decoder with absolute positions."""
    torch.manual_seed(0)
    tok = tokenizer()
    if kind == "qwen2":
        return q.make_model(SIZE, tok, 128, 0).to(dtype).eval()
    more = dict(max_position_embeddings=128, is_decoder=True, pad_token_id=tok.pad_token_id)
    config = BertConfig(vocab_size=len(tok), **SIZE, **more)
    return BertLMHeadModel(config).to(dtype).eval()


def vectors(model, ids, *positions: int) -> torch.Tensor:
    """Unit vectors at positions of one row, by a full forward pass."""
    row = torch.as_tensor(ids).view(1, -1)
    return q.embed_queries(model, row, torch.ones_like(row), [positions])


def module(split: str) -> str:
    return next(f"m{i}" for i in range(99) if q.split_of(f"m{i}") == split)


def context(paper: int = 0, number: int = 0, cited: str = "a") -> q.Context:
    return q.Context(paper, number, "", cited, "m", seen=False, named=False, copied=False)


# ---------------------------------------------------------------- labels and losses


def brute_force(paper, docs, tok, content: int):
    """The label rule on (piece, learned) pairs, written from the specification's sentence."""
    pieces = [("<|paper_start|>", True)]
    for s in paper.segments:
        if isinstance(s, str):
            pieces += [(t, True) for t in tok.convert_ids_to_tokens(q.plain_ids(tok, s))]
        else:
            inner = tok.convert_ids_to_tokens(q.plain_ids(tok, docs[s.doc].text)[:content])
            pieces += [("<|cite_start|>", True), *[(t, False) for t in inner], ("<|cite_end|>", False)]
    return [*pieces, ("<|paper_end|>", True)]


segment = st.one_of(st.sampled_from(WORDS), st.sampled_from("abcd").map(cite))


@given(st.lists(segment, min_size=1, max_size=8), st.integers(2, 60))
@settings(deadline=None, max_examples=60)
def test_labels_against_brute_force(segments, max_len) -> None:
    """Adjacent and truncated citations included."""
    toy, tok = corpus(segments), tokenizer()
    got = q.encode_paper(toy.papers[0], toy, tok, max_len, 3)
    want = brute_force(toy.papers[0], toy.docs, tok, 3)
    assert tok.convert_ids_to_tokens(got["input_ids"]) == [t for t, _ in want][:max_len]
    assert [label != -100 for label in got["labels"]] == [learned for _, learned in want][:max_len]
    starts = [i for i, (t, _) in enumerate(want) if t == "<|cite_start|>"]
    ends = [i for i, (t, _) in enumerate(want) if t == "<|cite_end|>"]
    assert got["ret_pos"] == [a for a, b in zip(starts, ends, strict=True) if b < max_len]
    assert got["targets"] == [s.doc for s in segments if not isinstance(s, str)][: len(got["ret_pos"])]


@pytest.mark.parametrize("kind", ["qwen2", "bert"])
def test_generation_loss_equals_the_models_own(kind) -> None:
    toy, tok, model = corpus(["we use", cite("a"), " it with"], ["then", cite("b")]), tokenizer(), tiny(kind)
    coded = q.encode_all(toy.papers, toy, tok, 64, 4)
    ids, mask = q.pad_rows([c["input_ids"] for c in coded], tok.pad_token_id)
    labels, _ = q.pad_rows([c["labels"] for c in coded], -100)
    ours = q.generation_loss(model, q.hidden_states(model, ids, mask), labels)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
    theirs = [torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())]
    theirs += [model(input_ids=ids, attention_mask=mask, labels=labels).loss] if kind == "qwen2" else []
    assert all(torch.allclose(ours, loss, atol=1e-5) for loss in theirs)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=-1)


def test_contrastive_loss_against_loop_and_cross_entropy() -> None:
    a, d, target = unit(5, 8), unit(7, 8, seed=1), torch.tensor([0, 3, 6, 3, 1])
    ours = q.contrastive_loss(a, d, target)
    assert torch.allclose(ours, torch.nn.functional.cross_entropy(a @ d.T / 0.01, target))
    total = 0.0
    for i, t in enumerate(target.tolist()):
        s = [sum(x * y for x, y in zip(a[i].tolist(), row.tolist(), strict=True)) / 0.01 for row in d]
        total += math.log(sum(math.exp(v - s[t]) for v in s))
    assert ours.item() == pytest.approx(total / 5, rel=1e-9)
    order = torch.randperm(7)
    assert torch.allclose(q.contrastive_loss(a, d[order], order.argsort()[target]), ours)
    assert torch.autograd.gradcheck(
        lambda x, y: q.contrastive_loss(x, y, target, 0.5), (a.requires_grad_(), d.requires_grad_())
    )


def test_masks_of_the_contrastive_loss() -> None:
    """Masked duplicates and left-out documents are as if they were not in the batch."""
    a, d, target = unit(2, 8), unit(4, 8, seed=1), torch.tensor([0, 2])
    twice, keys = torch.cat([d, d[:1]]), torch.tensor([5, 6, 7, 8, 5])
    clean = [q.contrastive_loss(a[i : i + 1], d, target[i : i + 1]) for i in (0, 1)]
    noisy = q.contrastive_loss(a[:1], twice, target[:1], doc_ids=keys)
    assert torch.allclose(noisy, clean[0])
    assert q.contrastive_loss(a[:1], twice, target[:1]) > noisy
    left_out = torch.tensor([[True, True, False, False]])
    kept = q.contrastive_loss(a[:1], d[[0, 2, 3]], torch.tensor([0]))
    assert torch.allclose(q.contrastive_loss(a[:1], d, target[:1], left_out=left_out), kept)


def test_scores_are_float32_in_bfloat16() -> None:
    """At tau = 0.01 a bfloat16 logit would have steps of 0.5."""
    a, d = unit(64, 32).float(), unit(64, 32, seed=1).float()
    target = torch.arange(64)
    with torch.autocast("cpu", torch.bfloat16):
        half = q.contrastive_loss(a, d, target)
    assert half == q.contrastive_loss(a, d, target)


def test_joint_loss_is_the_weighted_sum_and_trains_one_network() -> None:
    toy, tok = corpus(["we use", cite("a"), " it", cite("b")], ["then", cite("c"), " up"]), tokenizer()
    model = q.make_model(SIZE, tok, 128, 0)
    coded = q.encode_all(toy.papers, toy, tok, 64, 4)
    docs = {d.id: q.doc_ids_of(tok, d.text) for d in toy.docs.values()}
    batch = q.make_batch(coded, docs, tok.pad_token_id, np.random.default_rng(0))
    total, lg, lr = q.joint_loss(model, batch, lam=2.0)
    assert torch.allclose(total, lg + 2 * lr)
    queries = q.embed_queries(model, batch["input_ids"], batch["attention_mask"], batch["ret_pos"])
    vectors = q.embed_docs(model, tok, [toy.docs[n].text for n in "abc"])
    expected = q.contrastive_loss(queries, vectors, torch.tensor([0, 1, 2]))
    assert torch.allclose(lr, expected, atol=1e-4)
    easy = q.joint_loss(model, batch, hard=False)[2]  # a and b stand in one paper
    want = [q.contrastive_loss(queries[[i]], vectors[keep], torch.tensor([0])) for i, keep in
            ((0, [0, 2]), (1, [1, 2]), (2, [2, 0, 1]))]  # fmt: skip
    assert torch.allclose(easy, torch.stack(want).mean(), atol=1e-4)
    assert torch.allclose(q.loss_everywhere(model, batch), lg + lr, atol=1e-4)
    assert q.joint_loss(model, batch, lam=0.0)[2] == 0
    assert q.joint_loss(model, batch, generation=0.0)[1] == 0


# ---------------------------------------------------------------- vectors, cache, search


@pytest.mark.parametrize("kind", ["qwen2", "bert"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_vector(kind, side) -> None:
    model, rows = tiny(kind), [[10, 11, 12], [13, 14, 15, 16, 17, 18], [19]]
    width = max(map(len, rows))
    pads = [[0] * (width - len(r)) for r in rows]
    order = (lambda p, r: p + r) if side == "left" else (lambda p, r: r + p)
    ids = torch.tensor([order(p, r) for p, r in zip(pads, rows, strict=True)])
    mask = torch.tensor([order(p, [1] * len(r)) for p, r in zip(pads, rows, strict=True)])
    together = q.embed_rows(model, ids, mask)
    for i, row in enumerate(rows):
        alone = torch.tensor([row])
        want = model.base_model(input_ids=alone).last_hidden_state[0, -1]
        assert torch.allclose(together[i], want / want.norm(), atol=1e-5)
    assert torch.allclose(together.norm(dim=1), torch.ones(3))
    if side == "right":  # what training and evaluation use: no mask at all
        padded = q.pad_rows(rows, 0)
        assert torch.equal(padded[0], ids) and torch.equal(padded[1], mask)
        assert torch.allclose(q.embed_rows(model, *padded, behind=True), together, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "bert"])
def test_cached_step_equals_the_full_forward(kind) -> None:
    model, ids = tiny(kind), torch.randint(8, 250, (1, 20))
    cache = DynamicCache()
    with torch.no_grad():
        model.base_model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
    vector, after = q.ret_state(model, cache, int(ids[0, -1]))
    before, want = vectors(model, ids, 18, 19)
    assert torch.allclose(vector, want, atol=1e-5) and after.get_seq_length() == 20
    assert not torch.allclose(vector, before, atol=1e-3)  # the state of the token before is another one
    if kind == "qwen2":
        assert torch.allclose(model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1],
                              model.base_model(input_ids=ids).last_hidden_state[0, -1])  # fmt: skip


def test_captured_step_equals_the_full_forward() -> None:
    model, ids = tiny().base_model, torch.randint(8, 250, (1, 21))
    step = q.CachedStep(model, ids[:, :-1])
    want = model(input_ids=ids).last_hidden_state[0, -1]
    for _ in range(2):  # replaying must not change the state
        assert torch.allclose(step(int(ids[0, -1])), want, atol=1e-5)


def test_crop_to() -> None:
    model, cache = tiny(), DynamicCache()
    with torch.no_grad():
        model.base_model(input_ids=torch.randint(8, 250, (1, 9)), past_key_values=cache, use_cache=True)
    assert q.crop_to(cache, 9).get_seq_length() == 9
    assert q.crop_to(cache, 4).get_seq_length() == 4
    assert q.crop_to(cache, 4).get_seq_length() == 4


@given(st.integers(1, 70), st.integers(1, 4), st.integers(1, 40), st.booleans(), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_search_against_argsort(n, b, block, ties, seed) -> None:
    """Ties, k = N and N that no block divides included."""
    rng = np.random.default_rng(seed)
    index = rng.integers(-1, 2, (n, 3)).astype(float) if ties else rng.normal(size=(n, 3))
    query = rng.normal(size=(b, 3))
    k = int(rng.integers(1, n + 1)) if seed % 3 else n
    scores, ids = q.search(torch.tensor(query), torch.tensor(index), k, block)
    exact = query @ index.T
    want = -np.sort(-exact, 1)[:, :k]
    assert np.allclose(scores.numpy(), want)
    assert np.allclose(np.take_along_axis(exact, ids.numpy(), 1), want)
    assert all(len(set(row)) == k for row in ids.tolist())


# ---------------------------------------------------------------- the miner


SAMPLE = '''"""A module that cites nobody at all, on purpose."""

def solve(a, b):
    """Solve a linear system by the method of Gauss [1]_ and refine it.

    It calls :func:`norm` for the residual; see also `refine` and `missing`.
    A matrix `a` is a parameter and no citation.

    Parameters
    ----------
    a : `norm`
        Matrix.

    References
    ----------
    .. [1] Gauss, C. F., "Theoria motus corporum coelestium in sectionibus",
       Perthes, 1809.
    .. [2] Somebody, "A reference that nobody cites in the text at all", 1950.
    """

def norm(x):
    """Length of a vector in the sense of Euclid."""

def refine(x):
    """One step of iterative refinement of a solution."""
'''


def test_miner_on_a_written_docstring(tmp_path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "core.py").write_text(SAMPLE)
    (tmp_path / "tests" / "test_core.py").write_text(
        '"""A docstring of a test that cites :func:`norm` here."""'
    )
    (tmp_path / "broken.py").write_bytes(b'"""caf\xe9 in latin-1, without saying so, which is no UTF-8."""\n')
    found = q.mine_citations(["pkg"], {"pkg": tmp_path})
    (paper,) = found.papers
    assert [c.mark for c in paper.citations] == ["[1]_", ":func:`norm`", "`refine`"]
    docs = [found.docs[c.doc] for c in paper.citations]
    assert docs[0].title == "Theoria motus corporum coelestium in sectionibus"
    assert [d.title for d in docs[1:]] == ["pkg.core.norm", "pkg.core.refine"]
    assert "Perthes" not in paper.text and "References" not in paper.text
    assert len(found.docs) == 4  # the entry that nobody cites is in the database too
    assert not any("of a test" in text for text in [*found.plain, paper.text])


def test_entries_against_numpydoc() -> None:
    """The reference list that numpydoc sees is the one that the miner takes out; also on real docstrings."""
    from networkx.algorithms import centrality, community
    from numpydoc.docscrape import NumpyDocString

    found = [f.__doc__ for m in (centrality, community) for f in vars(m).values() if callable(f)]
    texts = [inspect.cleandoc(t) for t in found if t and re.search(r"\.\. \[\w+\]", t)][:50]
    assert len(texts) >= 20
    for text in texts:
        words = " ".join(NumpyDocString(text)["References"])
        rest, entries = docstrings.bibliography(text)
        assert all(" ".join(e.split())[:40] in " ".join(words.split()) for e in entries.values())
        assert not re.search(r"^\s*\.\. \[", rest, re.M)


def test_frozen_corpus() -> None:
    found = q.corpus_for(0)
    assert len(found.docs) > 6000 and len(found.papers) > 5000
    for paper in found.papers[::50]:
        assert "".join(s if isinstance(s, str) else s.mark for s in paper.segments) == paper.text
        assert paper.citations and not re.search(r"(^|/)(tests?|conftest)(/|$)", paper.module)
    keys = [q.citation_key(d) for d in found.docs.values()]
    assert len(set(keys)) == len(keys)
    splits = {s: {p.module for p in found.of(s)} for s in ("train", "dev", "test")}
    assert not splits["train"] & splits["test"] and not splits["train"] & splits["dev"]
    held_out = {p.text[:400] for p in found.of("test")}
    assert not held_out & {text[:400] for text in q.training_texts(found)}


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"\xff\xfe", "UTF-8"), (b'{"corpus_id": "a", "title": "t"}', "lacks abstract"), (b"{", "UTF-8 JSON"),
     (b'{"corpus_id":"a","title":"","abstract":"","bibtex":""}\n' * 2, "twice")],
)  # fmt: skip
def test_database_errors(tmp_path, content, word) -> None:
    file = tmp_path / "docs.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=word):
        q.read_docs(file)


# ---------------------------------------------------------------- the session


def session(prompt: str = "we use", seed: int = 0, **more) -> q.CopilotSession:
    toy = corpus()
    index = q.embed_docs(tiny(), tokenizer(), toy.texts)
    how = dict(content=4, temperature=2.0, seed=seed) | more
    return q.CopilotSession(tiny(), tokenizer(), toy, index, prompt, **how)


ACTIONS = ["write", "candidates", "accept", "reject", "force_citation", "edit", "<|cite_start|>"]


@given(st.lists(st.sampled_from(ACTIONS), max_size=10), st.integers(0, 50))
@settings(deadline=None, max_examples=25)
def test_session_keeps_its_promises(actions, seed) -> None:
    s = session(seed=seed)
    for action in actions:
        parts, state = list(s.parts), s.state
        choosing = action in ("candidates", "accept", "reject")
        call = getattr(s, action, s.edit)
        more = {"write": (6,), "edit": (" then",), "<|cite_start|>": (" x <|cite_start|> y",)}
        try:
            call(*more.get(action, ()))
        except RuntimeError:
            assert choosing != (state == "choosing") or s.ended
            assert (parts, state) == (s.parts, s.state)
            continue
        assert choosing == (state == "choosing")
        kept = parts[:-1] if action in ("edit", "<|cite_start|>") else parts
        for a, b in zip(kept, s.parts, strict=False):
            assert a == b or (isinstance(a, str) and b.startswith(a))
        assert s.cache.get_seq_length() <= len(s.ids)
        pending = s.state == "choosing"
        assert s.ids.count(s.mark[q.RET]) == sum(isinstance(p, q.Doc) for p in s.parts) + pending
    markdown, bibtex = s.export()
    cited = {k for group in re.findall(r"\\cite\{([^}]*)\}", markdown) for k in group.split(",")}
    assert cited == {p.id for p in s.parts if isinstance(p, q.Doc)}
    assert all(f"@misc{{{key}," in bibtex for key in cited)
    assert not any(mark in markdown for mark in q.MARKS)


def test_vector_of_a_session_is_that_of_the_text() -> None:
    def check() -> None:
        assert torch.allclose(s.vector, vectors(tiny(), s.ids, len(s.ids) - 1)[0], atol=1e-5)

    s = session()
    s.write(5)
    if s.state == "writing":
        s.force_citation()
    check()
    s.accept(2)
    s.edit(" we use it with the method")  # read by the next call, then replaced
    s.force_citation()
    s.reject()
    s.edit(" and then")
    s.force_citation()
    check()


def test_neighbouring_citations_are_merged() -> None:
    s = session()
    for rank in (1, 2):
        s.force_citation()
        s.accept(rank)
    assert re.search(r"\\cite\{[abcd],[abcd]\}", s.export()[0])


def test_typed_marks_are_letters() -> None:
    tok, text = tokenizer(), "a <|cite_start|> b <|cite_end|><|paper_end|>"
    ids = q.plain_ids(tok, text)
    assert not set(ids) & set(q.mark_ids(tok).values()) and tok.decode(ids) == text


# ---------------------------------------------------------------- measures


def test_recall_is_monotone_and_random_is_k_over_n() -> None:
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.normal(size=(4000, 50)))
    ranks = q.ranks_of(scores, torch.from_numpy(rng.integers(0, 50, 4000)))
    found = q.recall_at_k(ranks, range(1, 51))
    assert list(found.values()) == sorted(found.values()) and found[50] == 1
    assert all(abs(found[k] - k / 50) < 0.03 for k in (1, 10, 25))
    assert q.ranks_of(torch.zeros(1, 7), torch.tensor([3]))[0] == 7  # ties count against the method


def test_bootstrap_of_clusters_is_wider_than_of_items() -> None:
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(40), 10)
    a = np.repeat(rng.normal(size=40), 10)
    one = q.paired_cluster_bootstrap(a, np.zeros(400), clusters)
    many = q.paired_cluster_bootstrap(a, np.zeros(400), np.arange(400))
    assert one.difference == pytest.approx(a.mean()) and one.low < one.difference < one.high
    assert one.high - one.low > 2 * (many.high - many.low)


def test_bm25_against_its_formula() -> None:
    """Lucene's variant of BM25 written out."""
    given = ["newton root finding", "root mean square", "graph colouring"]
    texts = [text.split() for text in given]
    query, mean = ["root", "newton"], np.mean([len(t) for t in texts])
    want = np.zeros(3)
    for word in query:
        df = sum(word in t for t in texts)
        for i, t in enumerate(texts):
            tf = t.count(word)
            idf = math.log(1 + (3 - df + 0.5) / (df + 0.5))
            saturated = tf + 1.5 * (0.25 + 0.75 * len(t) / mean)
            want[i] += idf * tf / saturated
    got = q.BM25(given).scores("root newton")
    assert np.allclose(got / got.max(), want / want.max(), atol=1e-4)
    assert not q.BM25(given).scores("zzz").any()


def test_committed_ranks_are_live_ranks_and_the_window_is_from_dev() -> None:
    found, saved = q.corpus_for(0), np.load(readrun.asset("scholar_copilot/baselines.npz"))
    contexts = q.contexts_of(found, "test")
    width = q.WINDOWS[int(np.argmax(saved["bm25_dev"]))]
    assert {len(saved[k]) for k in saved if k in ("bm25", "bm25_path", "minilm_zero_shot")} == {len(contexts)}
    some = list(range(0, len(contexts), 60))
    live = q.bm25_ranks(q.BM25(found.texts), found, [contexts[i] for i in some], width)
    assert (live == saved["bm25"][some]).mean() >= 0.95  # floating-point ties may fall differently


def test_contexts_never_show_their_answer() -> None:
    found = q.corpus_for(0)
    for c in q.contexts_of(found, "test", 40):
        paper = found.of("test")[c.paper]
        assert paper.text.startswith(c.left) and c.module == paper.module
        assert paper.citations[c.number].doc == c.doc


def test_windows_end_at_the_retrieval_token() -> None:
    """A context that the length limit would cut is read in a window; the others in one pass: same vectors."""
    toy, tok, model = corpus(["we use" * 3, cite("a"), " it with" * 4, cite("b")]), tokenizer(), tiny()
    coded = q.encode_all(toy.papers, toy, tok, 10**9, 4)
    at = coded[0]["ret_pos"][1]
    whole, short = (q.context_queries(model, tok, coded, n) for n in (128, at))
    assert torch.allclose(whole[0], short[0], atol=1e-5)
    row = [coded[0]["input_ids"][0], *coded[0]["input_ids"][2 : at + 1]]
    assert torch.allclose(short[1], vectors(model, row, len(row) - 1)[0], atol=1e-5)
    assert len(q.window(list(range(50)), 40, 10)) == 10
    assert torch.allclose(whole, vectors(model, coded[0]["input_ids"], *coded[0]["ret_pos"]), atol=1e-5)


def test_evaluation_measures_what_it_says() -> None:
    """Ranks against a full sort, C5's losses against the model's own, C4's lists by hand."""
    segments = ("we use the", cite("a"), " of and then solve it", cite("b"), " with the method of it" * 3)
    papers = [q.Paper("p", "toy", module("test"), segments)]
    toy, tok, model = q.Corpus({n: doc(n) for n in "abcd"}, papers, []), tokenizer(), tiny()
    recipe = dict(max_len=120, content=3, doc_tokens=8)
    index = q.embed_docs(model, tok, toy.texts, 8)
    found = q.evaluate(model, tok, toy, index, recipe, dict(papers=0, batch=4, after=0))
    coded = q.encode_paper(papers[0], toy, tok, 120, 3)
    ids = torch.tensor([coded["input_ids"]])
    order = (vectors(model, ids, *coded["ret_pos"]) @ index.T).argsort(dim=1, descending=True)
    want = [row.tolist().index(t) + 1 for row, t in zip(order, (0, 1), strict=True)]
    assert found["ranks"].tolist() == want
    for n, k in enumerate(q.KS):
        lists = {i for row in order[:, : min(k, 4)].tolist() for i in row}
        assert found["dynamic"][n, 0] == len(lists & {0, 1}) / 2
    logs = model(input_ids=ids).logits[0].log_softmax(-1)
    at = coded["ret_pos"][1] + 1 + len(q.content_ids(tok, toy.docs["b"], 3)) + 1  # behind <|cite_end|>
    tail = coded["input_ids"][at:-1][:32]
    want = -np.mean([logs[at + n - 1, t].item() for n, t in enumerate(tail)])
    assert found["after_which"].tolist()[-1] == 1
    assert found["after_gold"][-1] == pytest.approx(want, abs=1e-4)
    own = model(input_ids=ids, labels=torch.tensor([coded["labels"]])).loss.item()
    assert found["nll"][0] / found["tokens"][0] == pytest.approx(own, abs=1e-4)


# ---------------------------------------------------------------- one's own checkpoint


def saved(folder: Path, seed: int) -> str:
    q.make_model(SIZE, tokenizer(), 256, seed).save_pretrained(folder, max_shard_size="20KB")
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(q, "run", SimpleNamespace(device="cpu"), raising=False)


def test_own_checkpoint_and_official_database(tmp_path, on_cpu) -> None:
    rows = [
        dict(corpus_id=str(i), paper_id=str(i), title=f"T{i}", abstract=f"the method {i}", source="arxiv",
             bibtex=f"@article{{key{i},\n title={{T{i}}}}}", citation_key=f"key{i}")
        for i in range(6)
    ]  # fmt: skip
    file = tmp_path / "corpus.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    found = [q.own_model(saved(tmp_path / f"m{s}", s), str(file)) for s in (0, 1)]
    assert found[0]["scores"] != found[1]["scores"] and set(found[0]["titles"]) <= {f"T{i}" for i in range(6)}
    assert "\\cite{key" in found[0]["text"] and "@article{key" in found[0]["bibtex"]
    assert (tmp_path / "m0" / "model.safetensors.index.json").is_file()


def test_checkpoint_errors(tmp_path, on_cpu) -> None:
    with pytest.raises(ValueError, match="checkpoint"):
        q.load_checkpoint(str(tmp_path))
    folder = saved(tmp_path / "m", 0)
    bare = tokenizer().backend_tokenizer.to_str()
    for i, mark in enumerate(q.MARKS):
        bare = bare.replace(mark, f"<|other_{i}|>")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bare), pad_token="<|endoftext|>",
                            unk_token="<|endoftext|>").save_pretrained(folder)  # fmt: skip
    with pytest.raises(ValueError, match="lacks"):
        q.load_checkpoint(folder)
    with pytest.raises(ValueError, match="database"):
        q.load_database(str(tmp_path / "none.jsonl"))


# ---------------------------------------------------------------- for the wrong reason


def loss(**change) -> torch.Tensor:
    good = {"q": torch.ones(2, 8), "d": torch.ones(3, 8), "target": torch.tensor([0, 1])}
    return q.contrastive_loss(**{**good, **change})


def forced(**more) -> q.CopilotSession:
    s = session(**more)
    s.force_citation()
    return s


HERE = Path(__file__).parent
one, nan, ones = q.Paper("p", "toy", "m", ("we",)), float("nan"), torch.ones
BAD = [
    ("tau", lambda: loss(tau=0.0)), ("finite", lambda: loss(q=torch.full((2, 8), nan))),
    ("shapes", lambda: loss(d=ones(3, 7))), ("shapes", lambda: loss(target=torch.tensor([0]))),
    ("target", lambda: loss(target=torch.tensor([0, 3]))),
    ("k: 0", lambda: q.search(ones(1, 3), ones(8, 3), 0)), ("length", lambda: q.crop_to(DynamicCache(), 5)),
    ("k: 9", lambda: q.search(ones(1, 3), ones(8, 3), 9)),
    ("do not fit", lambda: q.search(ones(1, 4), ones(8, 3), 1)),
    ("nothing_of_this_name", lambda: q.mine_citations(["nothing_of_this_name"])),
    ("twice", lambda: q.mine_citations(["networkx", "networkx"])),
    ("no docstrings", lambda: q.mine_citations(["pkg"], {"pkg": HERE / "mutants/llm"})),
    ("at least one", lambda: q.Corpus({}, [], [])), ("not in the data", lambda: corpus(["we", cite("z")])),
    ("same id", lambda: q.Corpus({"a": doc("a")}, [one, one], [])),
    ("prompt", lambda: session("we use " * 100)), ("rank", lambda: forced().accept(5)),
    ("index", lambda: q.CopilotSession(tiny(), tokenizer(), corpus(), ones(0, 32))),
    ("count from 1", lambda: q.recall_at_k(np.array([]), [1])),
    ("count from 1", lambda: q.recall_at_k(np.array([0, 1]), [1])),
    ("length", lambda: q.paired_cluster_bootstrap([1.0], [1.0, 2.0], [1, 1])),
    ("arm", lambda: q.finetune(tiny(), tokenizer(), corpus(), "hybrid", {}, 0)),
    ("max_len", lambda: q.encode_paper(one, corpus(), tokenizer(), 1)),
    ("ret_pos", lambda: vectors(tiny(), [1, 1, 1, 1], 4)),
    ("empty", lambda: q.embed_docs(tiny(), tokenizer(), [])),
    # no score is at least NaN: counting would give rank 0, the best of all
    ("finite", lambda: q.ranks_of(torch.tensor([[0.1, nan]]), torch.tensor([1]))),
]  # fmt: skip


@pytest.mark.parametrize(("word", "call"), BAD)
def test_bad_input_is_named(word, call) -> None:
    with pytest.raises(ValueError, match=word):
        call()


def test_calls_that_do_not_fit_the_state() -> None:
    with pytest.raises(RuntimeError, match="choosing"):
        forced().write()


def test_near_copies_and_earlier_citations_are_flagged() -> None:
    train, test = module("train"), module("test")
    left = "an opening of its own, then the same forty characters of text as "
    papers = [
        q.Paper("p0", "toy", train, ("Another " + left.replace("an opening", "a beginning"), cite("a"))),
        q.Paper("p1", "toy", test, (left, cite("a"), " and ", cite("b"), " again ", cite("b"))),
        q.Paper("p2", "toy", test, (left.replace(" ", "\n "), cite("b"))),
    ]
    docs = {"a": doc("a", "Euler 1768"), "b": doc("b", "Gauss 1809")}
    found = q.contexts_of(q.Corpus(docs, papers, []), "test")
    assert [c.copied for c in found] == [True, False, False, False]  # same words, another target: no copy
    assert [c.seen for c in found] == [True, False, False, False]
    assert [c.number for c in found if c.named] == [2]


def test_a_pasted_reference_is_not_found_any_more() -> None:
    """C4: at the second mark the gold text shows "a"; that it comes first there is no merit."""
    contexts = [context(number=n, cited=d) for n, d in enumerate("abc")]
    best = [["x", "b"], ["a", "b"], ["a", "c"]]
    assert q.dynamic_lists(best, contexts, 2) == [["x", "b", "b", "c"]]
    assert q.dynamic_lists(best, contexts, 1) == [["x"]]
    assert q.recall_curves({k: q.dynamic_lists(best, contexts, k) for k in q.KS}, contexts)[0, 0] == 0


@given(st.lists(st.sampled_from("abcde"), min_size=2, max_size=6), st.integers(0, 99))
def test_a_mark_alone_finds_no_more_than_all_marks(cited, seed) -> None:
    contexts = [context(0, n, name) for n, name in enumerate(cited)]
    best = [list(np.random.default_rng([seed, n]).permutation(list("abcde"))) for n in range(len(cited))]
    ranks = np.array([own.index(c.doc) + 1 for own, c in zip(best, contexts, strict=True)])
    least = q.own_marks(ranks, contexts)
    first = {name: cited.index(name) for name in cited}  # by hand: only where it is first cited
    expected = [np.mean([ranks[i] <= 3 for i in first.values()])] if len(first) > 1 else []
    assert least.tolist() == pytest.approx(expected)
    all_marks = q.recall_curves({k: q.dynamic_lists(best, contexts, k) for k in q.KS}, contexts)
    assert (least <= all_marks[q.KS.index(3)]).all()


def test_groups_of_contexts_are_what_they_say() -> None:
    docs = {n: doc(n, text) for n, text in (("a", "pkg.solveLinear system"), ("b", "pkg other words"))}
    some = q.Corpus(docs, [q.Paper("p", "toy", "toy/p", ("we use",))], [])
    texts = ["nothing at hand", "a linear system we solve", "other things"]
    contexts = [context()._replace(left=t, doc=d) for t, d in zip(texts, "aab", strict=True)]
    # "pkg" stands in both documents and weighs nothing; the other words of a document weigh the same
    assert q.shared_words(some, contexts).tolist() == pytest.approx([0, 1, 0.5])
    method = q.Paper("file:pkg.mod.Class.method", "pkg", "file", ("x",))
    function = q.Paper("file:pkg.mod.function", "pkg", "file", ("x",))
    for paper in (method, function):
        near = [q.near_home(paper, f"api:{n}") for n in ("pkg.mod.other", "pkg.mod.Class.b", "pkg.model.x")]
        assert near == [True, True, False]


def test_long_queries_of_the_encoder_keep_their_end() -> None:
    config = BertConfig(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                        num_attention_heads=2, max_position_embeddings=128)  # fmt: skip
    model, words = BertModel(config).eval(), list(range(10, 40))

    class Words:
        cls_token_id, sep_token_id, pad_token_id = 1, 2, 0

        def __call__(self, texts, add_special_tokens):
            return SimpleNamespace(input_ids=[[int(w) for w in text.split()] for text in texts])

    def encode(ids, **how):
        rows = q.bi_rows(Words(), [" ".join(map(str, ids))], limit=10, **how)
        return q.bi_embed(model, Words(), rows)

    with torch.no_grad():
        assert torch.allclose(encode(words, end=True), encode(words[-8:]), atol=1e-6)
        assert torch.allclose(encode(words), encode(words[:8]), atol=1e-6)


def test_continuations_fit_into_absolute_positions() -> None:
    """A long text before a citation is cut so that content and continuation fit."""
    toy, tok, model = corpus(["we use the method " * 40, cite("a"), " of it" * 20]), tokenizer(), tiny("bert")
    coded = q.encode_all(toy.papers, toy, tok, 10**9, 3)
    found = q.continuations(model, tok, toy, coded, [context()], ["b"], 128, 3)
    assert found["which"].tolist() == [0] and np.isfinite(found["gold"]).all()


def test_packed_weights_are_the_weights() -> None:
    """To within half a step; rows of zeros stay zeros; vectors are exact; a quarter of the size."""
    state = {"w": torch.randn(40, 64), "zero": torch.zeros(2, 3), "norm": torch.rand(64)}
    saved = q.packed(state)
    again = q.unpacked(saved)
    assert again.keys() == state.keys() and torch.equal(again["norm"], state["norm"])
    assert ((again["w"] - state["w"]).abs() <= 0.501 * saved["w.scale"]).all() and not again["zero"].any()
    assert sum(saved[name].nbytes for name in ("w", "w.scale")) < 0.3 * state["w"].nbytes
