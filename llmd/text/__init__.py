"""Strings ↔ token ids, both ways. Knows nothing of HTTP, of the engine, or of torch.

`chat_template`: messages → prompt.  `tokenizer`: text ↔ token ids.  `output`: token ids → text that is safe to show.
"""
