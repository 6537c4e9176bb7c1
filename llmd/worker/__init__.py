"""The process of one device rank: holds the weights and the KV cache and runs steps. The only one that imports torch.

It decides nothing: which sequences run, and where their KV lies, stands in the plan.
"""
