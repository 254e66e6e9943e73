"""Update rules, one file each: `init(param) -> state` and `direction(grad, state, hyper, step) -> (direction, state)`.

A rule is pure and written for one tensor; its hyper-parameters are numbers, or tensors that broadcast against the
parameter (one value per member of an ensemble). Learning rate, weight decay and clipping are not its business: they are
in `towtank.optim.descend`, once for all rules.
"""
