"Training: data, adapters, supervised, preferences, rewards, distillation, merging, tracking."
