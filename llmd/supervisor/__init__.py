"""The process that `llmd serve` is: it holds the listening sockets, starts the others and replaces what dies.

Imports almost nothing, so that the port is open at once; it never sees a request.
"""
