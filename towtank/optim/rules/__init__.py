"""Update rules, one file each; `towtank.optim.rule.Rule` says what a rule is.

A rule is written for one tensor, out of place, and knows nothing of parameter groups, clipping, decay or members: the torch
optimizer, the native kernel, the compiled step and the ensemble are all made of the same function.
"""
