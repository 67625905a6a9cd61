"""Bytes and text in and out, without a model: what the rest reads and writes, and its checks."""
