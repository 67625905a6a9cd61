"""The studies: what training leaves in the stream (`python -m study`), what a chain carries.

Reading order: jacobian, attribution, prompts, swaps, probe, perturb (each looks inside one model);
plan.yaml, plan, measure, __main__ (many runs, and what is measured in each); judge, report (from
the measures to docs/study.md); results, real, document (docs/training.md, markovian.md,
real_models.md). prior_work.md lists the mistakes they answer.
"""
