"""Speed and memory beside peers (`python -m bench`), growth with size, full-size shapes.

Every side of a measurement runs in a process of its own; the peers' scripts are in bench/peers.
"""
