"""What `scripts/gpu-check` is made of: one command that proves and measures llmd on one GPU, in at most nine minutes.

`__main__`: the command.  `running`: stages as child processes with deadlines.  `results`: their JSON.
`packages`: what the server needs that the machine lacks.  `stage`: a child.  `machine`: the GPU; `rehearsal`: what
stands for it where there is none.  `sizes`: what is measured, whole and tiny.
The stages: `device`, `correctness`, `kernels`, `steps`, `server`, `sweep`.  `performance` writes docs/performance.md.
"""
