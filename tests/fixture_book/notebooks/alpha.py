# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Alpha
#
# Prose of alpha.

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

run = readrun.start("alpha", profile=profile, seed=seed, seeds=seeds, device=device, checkpoint=checkpoint, only=only, out=out)
S = run.settings(smoke=dict(seeds=1, steps=2), cpu=dict(seeds=2, steps=3), gpu=dict(seeds=2, steps=4))
S

# %%
def score(values: list[float]) -> float:
    """Mean of values."""
    return sum(values) / len(values)


def measure(arm: str, seed: int, steps: int) -> dict:
    """One unit: a few random numbers, slowly."""
    values = []
    for _ in range(steps):
        time.sleep(float(os.environ.get("FIXTURE_SLEEP", "0")))
        values.append(random.Random(f"{arm}{seed}{len(values)}").random())
    return {"score": score(values) + (arm == "ours"), "values": values}


# %% [markdown]
# A worked example.

# %%
# NBVAL_CHECK_OUTPUT
print(f"{score([1.0, 2.0, 6.0]):.1f}")

# %%
units = {arm: {s: run.unit(measure, arm=arm, seed=s, steps=S.steps) for s in run.seeds} for arm in ("ours", "base")}
metrics = {"score": {arm: {s: u["score"] for s, u in row.items() if u.done} for arm, row in units.items()}}
here = run.results(metrics=metrics)
for arm, values in here.metrics["score"].items():
    print(arm, [f"{value:.6f}" for value in values])

# %% tags=["figure"]
print("a figure of", len(metrics["score"]["ours"]), "seeds")
