"""GGUF files to safetensors folders. `convert.convert` is the way in; torch is not needed."""
