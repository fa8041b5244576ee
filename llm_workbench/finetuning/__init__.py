"Training further: data, adapters, preferences, merging."
