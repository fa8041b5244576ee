"Formats of files, without knowledge of models: safetensors, GGUF, cards, the hub."
