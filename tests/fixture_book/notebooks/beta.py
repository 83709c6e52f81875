# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Beta
#
# Prose of beta.

# %% tags=["parameters"]
profile = ""
seed = 0
seeds = 0
device = "auto"
checkpoint = ""
only = ""
out = ""

# %%
import os
import random
import time

import readrun

run = readrun.start("beta", profile=profile, seed=seed, seeds=seeds, device=device, checkpoint=checkpoint, only=only, out=out)
S = run.settings(smoke=dict(seeds=1, steps=2), cpu=dict(seeds=2, steps=3), gpu=dict(seeds=2, steps=4))
S

# %%
def total(file: str) -> dict:
    """Sum of the numbers in a committed data file."""
    time.sleep(float(os.environ.get("FIXTURE_SLEEP", "0")))
    return {"sum": sum(map(int, readrun.asset(file).read_text().split()))}


# %%
unit = run.unit(total, file="beta/numbers.txt")
here = run.results(metrics={"total": {"ours": {0: unit["sum"]} if unit.done else {}}})
print("sum", here.metrics["total"]["ours"])
print("recorded", run.recorded() is not None)

# %%
(run.media / "dot.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>')
from IPython.display import HTML

HTML('<img src="readrun-media:beta/dot.svg" alt="nothing">')
