"""The two studies: what training leaves in the stream (`python -m study`), what a chain carries.

Reading order: jacobian, attribution, probe, perturb (each looks inside one model); plan, measure,
__main__ (many runs, and what is measured in each); hypotheses, findings, results, document (from
their numbers to RESULTS.md and docs/training.md). prior_work.md lists the mistakes they answer.
"""
