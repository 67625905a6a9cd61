"""Data sets as folders: published ones, sums, and the texts of the two bundled models.

`python -m tasks NAME OUT` writes train.jsonl, valid.jsonl, test.jsonl and a card, README.md, into
OUT. Training reads them with data=OUT and imports nothing of this folder.
"""
