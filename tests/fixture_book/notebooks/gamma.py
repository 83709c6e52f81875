# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Gamma
#
# Prose of gamma.

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

run = readrun.start("gamma", profile=profile, seed=seed, seeds=seeds, device=device, checkpoint=checkpoint, only=only, out=out)
S = run.settings(smoke=dict(seeds=1, steps=2), cpu=dict(seeds=2, steps=3), gpu=dict(seeds=2, steps=4))
S

# %%
print("before")

# %%
fault = os.environ.get("FIXTURE_FAULT", "")
if fault == "raise":
    raise ArithmeticError("planted in gamma")
if fault == "die":
    os._exit(7)
if fault == "hang":
    time.sleep(600)
if fault == "fill":
    (run.folder / "big").write_bytes(b"x" * (64 << 20))
here = run.results(metrics={})
print("after", run.profile)
