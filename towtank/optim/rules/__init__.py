"""Update rules, one file each: `init(param) -> state` and `direction_(grad, state, hyper, step) -> direction`.

A rule is written for one tensor, elementwise, and advances its state in place; it reads no parameter and no `.grad`. Its hyper-parameters are numbers, or tensors that broadcast against the
parameter (one value per member of an ensemble). Learning rate, weight decay and clipping are not its business: they are
in `towtank.optim.descend`, once for all rules.
"""
