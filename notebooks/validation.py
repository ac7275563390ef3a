# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How far is the simulator from the hardware?
#
# A simulator is worth as much as its distance from reality is known. Here is the way from a measurement to an error
# table: what was measured on four GPUs, how the simulator is made to run the same thing, how far apart the two are, and
# whether a person who trusts the simulator would choose the right schedule.
#
# No GPU is needed: the measurements are files in this repository. On the command line the same is
# `weft validate --node NODE --measurements FOLDER`.

# %%
import os
from dataclasses import replace
from datetime import date
from pathlib import Path

import matplotlib

from calibration.compare import read_sources
from calibration.validate import Inputs, validate
from calibration.validate_plots import RC, draw_points
from calibration.validate_ranking import Cell
from calibration.validate_story import draw_choices, draw_errors, draw_measured
from calibration.validate_text import table
from calibration.validate_two_batches import GraphWorld, vector_of
from sim.spec import load_node
from weft.notebook import picture_of

# %% [markdown]
# ## What is compared with what
#
# A node describes one machine in one link mode. The measurements are of four H200 cards: as they are, over NVLink; and
# *host-staged*, with direct access between GPUs switched off, so that all that they say to each other goes through the
# host's memory. The age of measurements counts from the day below; `weft validate` takes today.

# %% tags=["parameters"]
# Paths count from the top of the repository, wherever this is opened.
os.chdir(next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "benchmarks" / "data").is_dir()))
DATA = Path("benchmarks/data/h200-x4-2026-11-21")
LATER = Path("benchmarks/data/h200-x4-2026-11-22-one-by-one")
# Nodes that were fitted, each to two thirds of one survey and of the kernels of one GPU, all under load; the other
# third is what they are held against here.
NODES = {
    "h200-nvlink-x4-fitted": LATER / "survey-nvlink",
    "h200-hoststaged-x4-fitted": LATER / "survey-hoststaged",
}
KERNELS_FROM, KERNELS = DATA / "survey-kernels", ("gemm", "attention", "elementwise")
FORWARDS = (DATA / "forward.jsonl", DATA / "second-forward.jsonl")
DAY = date(2026, 11, 22)
LARGEST_ROWS = 128 if "WEFT_NOTEBOOK_PROMPTS" in os.environ else 10**9


def show(draw, *what):
    with matplotlib.rc_context(RC):
        return picture_of(draw(*what))


# %% [markdown]
# ## 1. One prediction, step by step
#
# Two equal batches enter together, and all that they launch is one CUDA graph: no host is in its time. First the parts
# of *one* batch alone, then both batches one after the other, then both interleaved as the policy plans it. The
# simulator gets the same plan from the same policy code; its host costs nothing, and its kernels follow one another as
# in a graph. Microseconds:

# %%
node = load_node("h200-hoststaged-x4-fitted")  # where links are slow enough for the policy to interleave
cell = Cell("glm-130b", 24, 64, 64, 4)
world = GraphWorld(node)
print(f"{cell}: {len(vector_of(cell).kernels)} kernels a batch on each of {cell.num_ranks} GPUs of {node.name}")
for schedule in ("compute alone", "comm alone", "serial", "policy"):
    time_us, plan = world.makespan_us(cell, schedule)
    print(f"{schedule:<15}{time_us:>9.0f}   {plan}")

# %% [markdown]
# ## 2. What was measured
#
# The same on hardware, over batch sizes, models and link modes, with up to a dozen schedules each. The gap between one
# batch after the other and the longer of its two parts (all computation, all communication) is the most that
# interleaving can win; the best schedule shows how much of it the hardware gave. Pictures show each model as it was
# measured most completely, which was the first time; since then collectives over NVLink have become faster
# (`docs/hardware.md`). Tables hold all measurements.

# %%
validations = []
for name, survey in NODES.items():
    node = load_node(name)
    links = [replace(s, rows=tuple(r for r in s.rows if r.what not in KERNELS)) for s in read_sources(survey, node)]
    kernels = read_sources(KERNELS_FROM, node)
    forwards = [source for path in FORWARDS for source in read_sources(path, node)]
    sources = [replace(s, rows=tuple(r for r in s.rows if r.at.get("rows", 0) <= LARGEST_ROWS))
               for s in (*links, *kernels, *forwards)]  # fmt: skip
    validations.append(validate(node, Inputs(tuple(sources)), DAY))
show(draw_measured, validations)

# %% [markdown]
# ## 3. The error table, over NVLink
#
# Errors are in per cent of what was measured; *bias* is the median with its sign, *spread* the hardware's own from
# repetition to repetition, where it was recorded. Of kernels, collectives and pairs these are the third that no fit may
# see. Two batches gave one number to the fit: how long a collective waits for the slowest rank, from two thirds of the
# later cells, of which it saw one batch after the other and the parts alone.
#
# The hardware planned with what it had measured of itself, the simulator with what the node says, so that their plans
# may differ; and the policy has changed since. A line of the table says how many of its plans came out the same.

# %%
print("\n".join(table(validations[0])))

# %%
show(draw_points, validations[0])

# %% [markdown]
# ## 4. The same through the host's memory

# %%
print("\n".join(table(validations[1])))

# %%
show(draw_points, validations[1])

# %% [markdown]
# ## 5. Where the error comes from
#
# A makespan is made of kernels, of collectives, and of what they do to each other. Where the parts alone are already
# off, no model of their overlap can be right. Where the parts are right and the policy's plan is not, the model of the
# overlap is to blame. What the fit itself misses, and why, is in `docs/calibration.md`.

# %%
show(draw_errors, validations)

# %% [markdown]
# ## 6. Does it choose right?
#
# A tool for choosing may be wrong about milliseconds if it is right about the order. The simulator takes the schedule
# that it predicts to be fastest; on the hardware that one was as fast as the second line says. Schedules that the
# hardware itself cannot tell apart do not count as wrong.

# %%
show(draw_choices, validations)

# %%
for found in validations:
    print(f"{found.node.name}:")
    for line in found.lines:
        if line.what in ("cells ranked right", "cells with the best chosen", "pairs in the right order"):
            print(f"  {line.what:<28}{line.typical:>4.0f} % of {line.count}")
        if line.what == "cost of the choice":
            print(f"  {line.what:<28}{line.typical:>6.1f} % on average, {line.worst:.1f} % at worst")
