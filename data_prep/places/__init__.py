"""Where files are when they are not on this machine: addresses, and the bytes behind them.

Cost: what is read over the network.
"""
