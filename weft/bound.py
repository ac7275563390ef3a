"""What overlap could reach at best: computation and communication side by side all the time, each as fast as alone."""

from __future__ import annotations

from models.config import load_model
from models.transformer import function_vector
from policy.batching import shape_of
from sim.cost import Costs
from sim.spec import load_node
from weft.runs import RunConfig, layout_of, make_requests


def ideal_bound(config: RunConfig) -> float:
    """Requests per second of tensor-parallel ranks whose computation and communication overlap perfectly.

    The requests of the run are batched in order; one over the larger of all computation and all communication, from
    solo durations without gaps between kernels. No policy that interleaves batches on the same ranks can exceed it;
    a pipeline, which communicates less, can.
    """
    model, node = load_model(config.model), load_node(config.node)
    layout = layout_of("tensor", node.num_gpus, config.tp, config.pp)
    layout.check(model)
    costs, requests = Costs(node), make_requests(config)
    compute_us = communication_us = 0.0
    for start in range(0, len(requests), config.options.batch_size):
        shape = shape_of(requests[start : start + config.options.batch_size], config.options)
        for kernel in function_vector(model, shape, layout).kernels:
            if kernel.is_communication:
                communication_us += costs.solo_us(kernel)
            else:
                compute_us += costs.solo_us(kernel)
    return len(requests) / max(compute_us, communication_us) * 1e6
