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
# # The feasible region
#
# Several GPUs hold one large model. How should they share the work of the requests that arrive? Each way of sharing has
# a price: some latency at some throughput. All that at least one way reaches is the *feasible region*.
#
# Everything below is **simulated**; no GPU is needed. Change the second cell (node, model, requests, policies,
# switches), run the notebook again, and see the region move.

# %%
import os
from dataclasses import replace

from msgspec.structs import replace as with_

from policy.options import Options
from weft.explore import Study
from weft.notebook import Case, compare, record, region_of, show_region, table
from weft.notebook_plot import show_beliefs, show_lanes, show_switches
from weft.region_table import region_table
from weft.runs import RunConfig

# %% [markdown]
# ## What is simulated
#
# Nodes: `weft nodes` lists them; the path of a file of your own works too. A recorded trace goes in with
# `dataset_name="azure"` (or `mooncake`, `burstgpt`, `csv`) and `dataset_path="..."` in place of `input_len`.
# Every switch of the policies is a field of `Options`.
#
# A hundred requests a run keep the notebook quick and its percentiles rough. For numbers to rely on, raise
# `num_prompts`; the time grows with it.

# %% tags=["parameters"]
NODE = "a100-pcie-x4"
OTHER_NODE = "h200-nvlink-x4"
POLICIES = ("tensor", "pipeline", "hybrid", "interleaved")
OPTIONS = Options(batch_size=2, depth=3)
BASE = RunConfig(
    model="glm-130b",
    num_prompts=int(os.environ.get("WEFT_NOTEBOOK_PROMPTS", "100")),
    input_len="16:128",
    burstiness=1.0,
    seed=0,
    options=OPTIONS,
)

# %% [markdown]
# ## 1. GPUs behind a slow link
#
# Four A100 cards talk over PCIe. Tensor parallelism answers a single request soonest, but its GPUs wait for
# every all-reduce. A pipeline hardly communicates, but each request passes the stages one after the other. Interleaved
# parallelism computes one batch while another communicates.

# %%
region = region_of(Study(BASE, POLICIES, (BASE.model,), (NODE,)))
show_region(region)

# %%
print("\n".join(region_table(region, percentile=90)))

# %% [markdown]
# ## 2. GPUs behind a fast link
#
# The same model on four H200 cards with NVLink. There is less communication to hide, so interleaving has less to win:
# compare how far its curve ends to the right of tensor parallelism's in the two pictures, and the last lines of the
# two tables.

# %%
other = region_of(Study(BASE, POLICIES, (BASE.model,), (OTHER_NODE,)))
show_region(other)

# %%
print("\n".join(region_table(other, percentile=90)))

# %% [markdown]
# ## 3. What each mechanism is worth
#
# Interleaving is several mechanisms. Here each is switched off alone, and the rest stay. The load is 85 % of what
# interleaving sustains. A dot on the line means: not needed *here*, with this node, model and load. Elsewhere it may
# be.

# %%
capacity = {curve.policy: curve.capacity for curve in region.curves}
rate = round(0.85 * capacity.get("interleaved", region.reference.capacity), 1)
ours = with_(BASE, node=NODE, policy="interleaved")
changes = {
    "as set above": {},
    "two batches in flight": {"depth": 2},
    "kernels are not split": {"decomposition": "off", "chunks": False},
    "no SMs set aside": {"partition": 0},
    "contention not anticipated": {"anticipation": "off"},
    "fills need not fit": {"duration_matching": False},
    "host waits for every round": {"sync": "cpu-gpu"},
    "host never waits": {"sync": "inter-stream"},
}
cases = {name: Case(with_(ours, options=replace(OPTIONS, **change))) for name, change in changes.items()}
cases["tensor parallelism"] = Case(with_(ours, policy="tensor"))
outcomes = compare(cases, rate)
show_switches(outcomes, cases, rate)

# %%
print(table(outcomes, rate))

# %% [markdown]
# ## 4. A wrong belief
#
# The policy plans with a profile: what it believes about the hardware. Let it believe that communication takes a
# quarter, half, twice or four times as long as it does. The hardware does not change. What is lost is the price of
# a bad calibration.

# %%
wrong = compare({str(factor): Case(ours, factor) for factor in (0.25, 0.5, 2.0, 4.0)}, rate)
beliefs = {float(factor): outcome for factor, outcome in wrong.items()} | {1.0: outcomes["as set above"]}
show_beliefs(beliefs, outcomes["tensor parallelism"], rate, f"{BASE.model} on {NODE}")

# %% [markdown]
# ## 5. The overlap itself
#
# A few layers in the middle of a run, kernel by kernel, on one GPU. With tensor parallelism nothing is computed during
# an all-reduce. With interleaving the light batch computes while the dark one communicates, and the reverse; kernels
# that run side by side take longer than alone, and the policy has priced that in.

# %%
short = with_(BASE, node=NODE, num_prompts=12, input_len="64", request_rate=float("inf"))
runs = record([with_(short, policy="tensor"), with_(short, policy="interleaved")])
show_lanes(runs, length_ms=3.0)
