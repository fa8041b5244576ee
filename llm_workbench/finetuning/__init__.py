"From data to adapters: training open models."
