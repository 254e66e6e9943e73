"""A problem: a model, a loss and data, as the operators of `towtank.curvature` see them.

`Problem` is what a user makes. What operators stand on, in the order in which they use it::

    with problem.measuring():                          # modes, backends, random numbers; all put back on exit
        for batch in problem.batches():                # Batch(raw, targets, weight, index, count)
            leaves = problem.leaves()                  # {name: our own differentiable copy}, fixed order
            outputs = problem.outputs(batch, leaves)
            loss = batch.weight * problem.loss_of(outputs, batch)   # the full loss is the sum of these

    problem.names, .shapes, .slices, .size, .dtype, .device    # of flat vectors (size,)
    problem.flatten({name: tensor}), problem.unflatten(vector)
    problem.backends()          # the cheap half of `measuring`: enough for products of a graph that is already built
    problem.versions()          # moves when a parameter or buffer is changed in place: rebuild what was kept
    problem.value(leaves), problem.gradient(leaves)             # full loss; (full loss, flat gradient)
    problem.restrict(names), problem.batch(i), problem.replace(...), problem.convention
"""

from towtank.problem.data import Batch
from towtank.problem.problem import Problem

__all__ = ["Batch", "Problem"]
