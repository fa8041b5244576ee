"Files, tokenizers and where models come from."
