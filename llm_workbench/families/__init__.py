"What each model family means by its configuration and calls its tensors: read, compared, opened."
