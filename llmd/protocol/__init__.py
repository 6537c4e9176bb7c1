"""What crosses a process border. Data only: frozen structs without methods that act.

`generation`: server ↔ engine.  `steps`: engine ↔ worker.  `control`: supervisor ↔ every child.
`framing`: bytes ↔ messages, without I/O.
"""
