"From an open model to your own."
