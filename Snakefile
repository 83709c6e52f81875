# Executes chapters: one job per status file. `python -m readrun book` and `sweep` say which, on the command line.
#
# The path of a status holds the key of everything it depends on, so whether to run is whether the file is there;
# time stamps decide nothing (`ancient`). A job writes a status whatever happens and then succeeds: Snakemake
# deletes the outputs of rules that fail. Pages and the exit code are made from the statuses afterwards.
import os
import re
import sys

ROOT = os.getcwd()  # --directory: also on a cluster, where jobs start elsewhere and without our environment
LIB = os.path.join(workflow.basedir, "lib")
BUILD = config["build"]
MEMORY = {"smoke": 4096, "cpu": 6144, "gpu": 32768}  # MiB
MINUTES = {"smoke": 10, "cpu": 30, "gpu": 100}


def seeds(wildcards):
    narrowed = re.search(r"-s(\d+)n(\d+)$", wildcards.run)
    return "--seed {} --seeds {}".format(*narrowed.groups()) if narrowed else ""


wildcard_constraints:
    slug="[^/]+",
    profile="[^/]+",
    run="[^/]+",


rule execute:
    input:
        ancient("notebooks/{slug}.py"),
    output:
        BUILD + "/{slug}/{profile}/{run}/status.json",
    params:
        folder=lambda wildcards: f"{BUILD}/{wildcards.slug}/{wildcards.profile}/{wildcards.run}",
        seeds=seeds,
    threads: 1
    resources:
        mem_mb=lambda wildcards: MEMORY[wildcards.profile],
        runtime=lambda wildcards: MINUTES[wildcards.profile],
        gpu=lambda wildcards: int(wildcards.profile == "gpu"),
    shell:
        # exec: with a shell in between the job would not notice that Snakemake was killed
        "export PYTHONPATH={LIB:q}${{PYTHONPATH:+:$PYTHONPATH}} READRUN_ROOT={ROOT:q}; "
        "exec {sys.executable:q} -m readrun --with-parent execute {wildcards.slug:q} --profile {wildcards.profile:q} "
        "{params.seeds} --folder {params.folder:q} --expect {wildcards.run:q}"
