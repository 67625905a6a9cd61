"""The gate: before a training run, is there anything to teach? Read in this order:

checks (is a reply right?), drafts and conversations (the benchmark), clean (does a prompt reach a
base untouched?), replies, judge, verdict, evaluate (all of it), report. self_instruct writes
training data with the model itself.
"""
