"From logits to text."
