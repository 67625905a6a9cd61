"""The two studies: what training leaves in the stream (`python -m study`), what a chain carries.

Reading order: jacobian, attribution, probe, perturb (each looks inside one model); plan, measure
and __main__ (many runs); hypotheses and results (from their numbers to documents). prior_work.md
says which earlier claims and mistakes all of it answers.
"""
