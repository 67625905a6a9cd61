"""Texts and token ids, no model: problems, tokenizers, templates, targets, answer readers."""
